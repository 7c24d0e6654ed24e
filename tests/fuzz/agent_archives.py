"""Fuzz target: tar streams that a hostile guest's agent sends for `vmctl cp -r`.

Whatever they hold, the client writes, removes or changes nothing outside the target, and makes no
link that leads out of it. The bytes are a stream, or describe its members.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from tests.fuzz.inputs import Input, check_line
from vmctl.client import CommandError
from vmctl.guest.unpack import unpack
from vmm_kvm.text import printable

_PARTS = ("a", "b", "c", "..", ".", "", "mine", "\udcff")
_TARGETS = ("a", "..", "../..", "a/..", "/etc", ".", "b/../..", "../a", "mine", "../../canary", "")
_KINDS = (
    *(tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE),
    *(tarfile.LNKTYPE, tarfile.FIFOTYPE),
)
_FORMATS = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
_MEMBERS_MAX = 12
_CANARY = b"canary"
_PLACE = "/dev/shm"


def run(data: bytes) -> None:
    """Unpack a stream; the first byte chooses its kind and its target."""
    given = Input(data)
    how = given.number(1)
    stream = io.BytesIO(given.rest() if how & 1 else _made(given, _FORMATS[(how >> 2) % 3]))
    with tempfile.TemporaryDirectory(dir=_PLACE) as folder:
        top = Path(folder)
        (top / "canary").write_bytes(_CANARY)
        (top / "to" / "tree").mkdir(parents=True)
        (top / "to" / "tree" / "mine").symlink_to("../../canary")
        into, first = (top / "to", "tree") if how & 2 else (top / "to" / "tree", None)
        try:
            for line in unpack(stream.read, str(into), first):
                assert line.endswith(": left out: it leads out of what is copied")
        except (CommandError, OSError) as err:
            check_line(printable(str(err)))
        _check(top)
        shutil.rmtree(top / "to")


def _made(given: Input, style: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=style, errors="surrogateescape") as archive:
        for _ in range(_MEMBERS_MAX):
            if given.is_over:
                break
            name = "/".join(given.choice(_PARTS) for _ in range(1 + given.number(1) % 5))
            member = tarfile.TarInfo(f"tree/{name}" if given.number(1) & 3 else name)
            member.type = given.choice(_KINDS)
            member.mode = 0o700 | given.number(2)
            member.linkname = given.choice(_TARGETS)
            member.size = given.number(1) if member.type == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return buffer.getvalue()


def _check(top: Path) -> None:
    assert sorted(path.name for path in top.iterdir()) == ["canary", "to"]
    assert (top / "canary").read_bytes() == _CANARY
    assert [path.name for path in (top / "to").iterdir()] == ["tree"]
    tree = top / "to" / "tree"
    for where, folders, files in os.walk(tree):
        for name in (*folders, *files):
            path = Path(where) / name
            if path.is_symlink() and path != tree / "mine":
                # A part of the path may be missing: existing parts lead no further.
                found = os.path.realpath(path)
                through_mine = found == str(top / "canary")
                assert through_mine or f"{found}/".startswith(f"{tree}/"), (path, found)
            assert not path.lstat().st_mode & 0o7000


def seeds() -> list[bytes]:
    """Return streams of both kinds."""
    found = [bytes([how]) + bytes(range(step, 90, step)) for how in (0, 2, 4, 8) for step in (1, 3)]
    for style in _FORMATS:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=style) as archive:
            long = "tree/" + "n" * (120 if style else 90)
            for name, kind in (("tree", tarfile.DIRTYPE), (long, tarfile.REGTYPE)):
                member = tarfile.TarInfo(name)
                member.type = kind
                member.mode = 0o755
                archive.addfile(member)
            link = tarfile.TarInfo("tree/l")
            link.type, link.linkname = tarfile.SYMTYPE, "x/" + "t" * (110 if style else 90)
            archive.addfile(link)
        found.append(b"\x03" + buffer.getvalue()[:4096])
    return [*found, b"\x01", b"\x03" + bytes(1024)]
