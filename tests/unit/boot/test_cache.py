"""The cache of unpacked kernels: hits, and entries that are not trusted."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tests.unit.boot.images import CODE
from vmm_kvm.boot.cache import KernelCache, default_directory
from vmm_kvm.boot.source import FileSource

KERNEL = CODE * 3
LONG_AGO_NS = 1_000_000_000_000_000_001


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The place of the cache, not made yet."""
    return tmp_path / "kernels"


class Image:
    """A kernel image whose change time, which no program can set, seems to be long ago."""

    def __init__(self, path: Path, data: bytes = b"image") -> None:
        path.write_bytes(data)
        self.path = path
        self.digest = hashlib.sha256(data).hexdigest()

    def open(self) -> FileSource:
        """Open it."""
        return FileSource.open(str(self.path))


def _settle(path: Path) -> None:
    """Wait, without sleeping, until the file's time stamps are in the past.

    The cache keeps no stamp of a file that could still change within one tick of the clock.
    """
    deadline = path.stat().st_ctime_ns + 110_000_000
    probe = path.with_suffix(".probe")
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_ctime_ns > deadline:
            probe.unlink()
            return


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """An image that has been left alone for a while."""
    made = Image(tmp_path / "vmlinuz")
    _settle(made.path)
    return made


def _contents(source: FileSource | None) -> bytes | None:
    return None if source is None else source.read(0, source.size)


def test_empty_cache(directory: Path, image: Image) -> None:
    """An empty cache finds nothing, and a look-up makes no directory."""
    cache = KernelCache(str(directory))
    assert (
        cache.find(image.open()),
        cache.find_digest(image.open(), image.digest),
        directory.exists(),
    ) == (None, None, False)


def test_finds_by_state(directory: Path, image: Image) -> None:
    """While neither file changes, the kernel is found without a digest."""
    cache = KernelCache(str(directory))
    cache.keep(image.open(), image.digest, [KERNEL[:100], KERNEL[100:]])
    assert _contents(cache.find(image.open())) == KERNEL


def test_finds_by_content(directory: Path, image: Image, tmp_path: Path) -> None:
    """A copy of the image finds the same kernel by digest, and then by state."""
    cache = KernelCache(str(directory))
    cache.keep(image.open(), image.digest, [KERNEL])
    copy = Image(tmp_path / "copy")
    _settle(copy.path)
    assert cache.find(copy.open()) is None
    assert _contents(cache.find_digest(copy.open(), copy.digest)) == KERNEL
    assert _contents(cache.find(copy.open())) == KERNEL


def test_changed_image_is_not_found(directory: Path, image: Image) -> None:
    """An image that was written, even with its old times restored, has another state."""
    cache = KernelCache(str(directory))
    cache.keep(image.open(), image.digest, [KERNEL])
    before = image.path.stat()
    image.path.write_bytes(b"other")
    os.utime(image.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.find(image.open()) is None


def test_new_image_gets_no_stamp(directory: Path, tmp_path: Path) -> None:
    """An image written just now could change again within one tick: only its content counts."""
    image = Image(tmp_path / "new")
    cache = KernelCache(str(directory))
    cache.keep(image.open(), image.digest, [KERNEL])
    assert cache.find(image.open()) is None
    assert _contents(cache.find_digest(image.open(), image.digest)) == KERNEL


def test_changed_kernel_is_thrown_away(directory: Path, image: Image) -> None:
    """A kept kernel that was changed is never returned, and is removed at the failed digest."""
    cache = KernelCache(str(directory))
    cache.keep(image.open(), image.digest, [KERNEL])
    path = directory / image.digest
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    assert cache.find(image.open()) is None
    assert cache.find_digest(image.open(), image.digest) is None
    assert not path.exists()


@pytest.mark.parametrize("size", [0, 1, 31, 32, 1000])
def test_truncated_kernel_is_thrown_away(directory: Path, image: Image, size: int) -> None:
    """A kept kernel that lost its end is not returned either, however short it is."""
    cache = KernelCache(str(directory))
    cache.keep(image.open(), image.digest, [KERNEL])
    os.truncate(directory / image.digest, size)
    assert cache.find(image.open()) is None
    assert cache.find_digest(image.open(), image.digest) is None


@pytest.mark.parametrize("text", ["", "x", "../../etc/passwd y", "a b c", "\xff", "0" * 64 + " z"])
def test_nonsense_in_a_stamp(directory: Path, image: Image, text: str) -> None:
    """A stamp with nonsense in it is ignored."""
    cache = KernelCache(str(directory))
    cache.keep(image.open(), image.digest, [KERNEL])
    (stamp,) = directory.glob("*.stamp")
    stamp.write_text(text, "latin-1")
    assert cache.find(image.open()) is None


def test_directory_that_others_can_write(directory: Path, image: Image) -> None:
    """A cache that another user could have filled is not used."""
    cache = KernelCache(str(directory))
    cache.keep(image.open(), image.digest, [KERNEL])
    directory.chmod(0o777)
    assert (
        cache.find(image.open()),
        cache.find_digest(image.open(), image.digest),
    ) == (None, None)


def test_directory_that_cannot_be_made(tmp_path: Path, image: Image) -> None:
    """Without a place for the cache nothing is kept, and no error is reported."""
    cache = KernelCache(f"{image.path}/kernels")
    cache.keep(image.open(), image.digest, [KERNEL])
    assert cache.find(image.open()) is None
    assert [path.name for path in tmp_path.iterdir()] == ["vmlinuz"]


def test_bounded(directory: Path, tmp_path: Path) -> None:
    """The cache keeps eight kernels, those used last."""
    cache = KernelCache(str(directory))
    for index in range(12):
        image = Image(tmp_path / "vmlinuz", bytes((index,)))
        cache.keep(image.open(), image.digest, [KERNEL])
        # The order of use must not depend on the clock's resolution.
        os.utime(directory / image.digest, ns=(LONG_AGO_NS + index, LONG_AGO_NS + index))
    kept = {hashlib.sha256(bytes((index,))).hexdigest() for index in range(4, 12)}
    assert kept == {path.name for path in directory.iterdir()}


def test_abandoned_files_are_removed(directory: Path, image: Image) -> None:
    """Remains of a killed start are removed after a while; files being written stay."""
    directory.mkdir(mode=0o700)
    (directory / ".old").write_bytes(b"")
    (directory / ".new").write_bytes(b"")
    os.utime(directory / ".old", ns=(LONG_AGO_NS, LONG_AGO_NS))
    KernelCache(str(directory)).keep(image.open(), image.digest, [KERNEL])
    assert [path.name for path in directory.glob(".*")] == [".new"]


@pytest.mark.parametrize(
    ("xdg", "home", "expected"),
    [
        ("/x", "/home/u", "/x/vmm-kvm/kernels"),
        ("relative", "/home/u", "/home/u/.cache/vmm-kvm/kernels"),
        ("", "/home/u", "/home/u/.cache/vmm-kvm/kernels"),
        ("", "", None),
    ],
)
def test_default_directory(
    monkeypatch: pytest.MonkeyPatch, xdg: str, home: str, expected: str | None
) -> None:
    """The default is the XDG directory, else one in the home directory, else none."""
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", home)
    assert expected == default_directory()
