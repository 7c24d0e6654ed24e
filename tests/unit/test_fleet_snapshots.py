"""Snapshots of a fleet: fetched from other hosts that may be wrong, checked, kept and pruned."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.unit.snapshot.samples import MANIFEST, STATE_BYTES, filled
from tests.vmctl_driver import VMCTL
from vmm_fleet import InVm
from vmm_fleet.snapshots import KEPT_MAX, MissingError, Part, Source, add, obtain, read
from vmm_kvm.snapshot.file import write_file


def small_snapshot(path: Path, name: str = "web") -> Path:
    """Write a snapshot of a machine of 3 MiB."""
    with filled() as memory:
        write_file(str(path), MANIFEST._replace(name=name), STATE_BYTES, memory)
    return path


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store of this test's host."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("VMCTL_IMAGES", str(tmp_path / "images"))
    return tmp_path / "data" / "vmm-kvm" / "snapshots"


@pytest.fixture
def snapshot(tmp_path: Path) -> bytes:
    """The contents of a snapshot's file."""
    return small_snapshot(tmp_path / "made").read_bytes()


def digest_of(data: bytes) -> str:
    """Return the digest that a job names it by."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def serving(data: bytes, asked: list[int] | None = None) -> Source:
    """Return another host that has contents."""

    def part(offset: int) -> Part:
        if asked is not None:
            asked.append(offset)
        piece = data[offset : offset + (1 << 20)]
        return Part(len(data), len(piece), piece if piece.strip(b"\0") else b"")

    return part


def from_(*sources: Source) -> Callable[[], Iterable[Source]]:
    """Return sources, as a job has them."""
    return lambda: sources


def left(store: Path) -> list[str]:
    """Return the files in a store."""
    return sorted(path.name for path in store.rglob("*") if path.is_file())


def test_fetched_once(store: Path, snapshot: bytes) -> None:
    """It is fetched at first use, is this user's alone, and its zeros are holes."""
    digest, asked = digest_of(snapshot), list[int]()
    path = Path(obtain(digest, from_(lambda _: None, serving(snapshot, asked))))
    assert path == store / digest.replace(":", "-")
    assert path.read_bytes() == snapshot
    assert path.stat().st_blocks * 512 < len(snapshot) // 2
    assert store.stat().st_mode & 0o777 == 0o700
    count = len(asked)
    assert obtain(digest, from_(serving(snapshot, asked))) == str(path)
    assert len(asked) == count
    parts = [read(digest, 0), read(digest, len(snapshot))]
    assert [part and part.size for part in parts] == [len(snapshot)] * 2
    assert [part and part.length for part in parts] == [2 << 20, 0]


def test_goes_on(store: Path, snapshot: bytes) -> None:
    """What came from a host that failed stays, and another one sends the rest."""
    digest, asked = digest_of(snapshot), list[int]()

    def failing(offset: int) -> Part | None:
        if offset >= 1 << 20:
            raise MissingError("it has ended")
        return serving(snapshot)(offset)

    with pytest.raises(MissingError, match="it has ended"):
        obtain(digest, from_(failing))
    assert left(store) == [digest.replace(":", "-")]
    assert Path(obtain(digest, from_(serving(snapshot, asked)))).read_bytes() == snapshot
    assert asked[0] == 1 << 20


BAD: dict[str, tuple[Callable[[bytes], Source], str]] = {
    "another": (lambda data: serving(data[::-1]), "other contents of this digest"),
    "nothing": (lambda _: lambda _: None, "no worker's host has it"),
    "endless": (lambda _: lambda _: Part(1 << 50, 1, b"x"), f"a host has {1 << 50} bytes of it"),
    "empty": (lambda _: lambda _: Part(0, 0, b""), "a host has 0 bytes of it"),
    "a long part": (lambda _: lambda _: Part(9, 10, b"x" * 10), "another part than was asked for"),
    "a short part": (lambda _: lambda _: Part(9, 9, b"x"), "another part than was asked for"),
    "no part": (lambda _: lambda _: Part(9, 0, b""), "another part than was asked for"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_hosts(case: str, store: Path, snapshot: bytes) -> None:
    """Each ends with one line, unless a better host follows; nothing wrong is left."""
    make, told = BAD[case]
    digest = digest_of(snapshot)
    with pytest.raises(MissingError) as caught:
        obtain(digest, from_(make(snapshot)))
    assert str(caught.value).endswith(told)
    assert left(store) == []
    path = obtain(digest, from_(make(snapshot), serving(snapshot)))
    assert Path(path).read_bytes() == snapshot


def test_no_snapshot(store: Path, tmp_path: Path) -> None:
    """A file that is no snapshot is not kept, though it has the digest."""
    data = os.urandom(100_000)
    with pytest.raises(MissingError):
        obtain(digest_of(data), from_(serving(data)))
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(MissingError):
        add(str(tmp_path / "file"))
    assert left(store) == []


@pytest.mark.parametrize("digest", ["", "sha256:x", f"sha512:{'0' * 128}", "sha256:../../x"])
def test_digests(digest: str, store: Path) -> None:
    """Nothing but a sha256 digest names a snapshot."""
    with pytest.raises(ValueError, match="invalid digest"):
        read(digest, 0)
    with pytest.raises(ValueError, match="invalid digest"):
        obtain(digest, from_())
    if digest:
        with pytest.raises(ValueError, match="invalid digest"):
            InVm(print, snapshot=digest)
    assert not store.exists()


def test_bounds(store: Path, tmp_path: Path) -> None:
    """The ones that were used last are kept; prune removes all."""
    digests = []
    for number in range(KEPT_MAX + 1):
        path = small_snapshot(tmp_path / f"made{number}", name=f"vm{number}")
        digests.append(add(str(path)))
        os.utime(store / digests[-1].replace(":", "-"), (number + 1, number + 1))
        if number == KEPT_MAX - 1:
            obtain(digests[0], from_())
    assert left(store) == sorted(one.replace(":", "-") for one in (digests[0], *digests[2:]))
    done = subprocess.run([VMCTL, "image", "prune"], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert left(store) == []
