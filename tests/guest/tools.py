"""Programs for a guest that has only busybox: a disk with them and their libraries."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests import artifacts

MODULES = (*artifacts.NET_MODULES, "virtio_blk")
"""Modules that the guest has to load."""
UNPACK = (
    "mkdir -p /tmp /etc; echo root:x:0:0::/:/bin/sh >/etc/passwd;"
    " tar -x -f /dev/vda -C / 2>/dev/null; true"
)
"""Setup for the guest's shell; the disk is its first. tcpdump needs a passwd entry for root."""
_BLOCK = 1 << 20


def tools_disk(place: Path, *programs: str, scripts: Mapping[str, str] | None = None) -> Path:
    """Write a disk image, a tar archive, that holds programs of this host; returns its path.

    `scripts` are texts by their paths in the guest, which it can execute.
    A program with a slash in it is a file, which can be a library.
    """
    with tarfile.open(place, "w") as archive:
        for name, text in (scripts or {}).items():
            member, data = tarfile.TarInfo(name.removeprefix("/")), text.encode()
            member.mode, member.size = 0o755, len(data)
            archive.addfile(member, io.BytesIO(data))
        for name in sorted({file for program in programs for file in _files(program)}):
            archive.add(Path(name).resolve(), arcname=name.removeprefix("/"))
    with place.open("ab") as image:
        image.truncate(-(-image.tell() // _BLOCK) * _BLOCK)
    return place


def missing(programs: Sequence[str]) -> str:
    """Return the missing ones of these programs, in words; empty if there are none."""
    absent = [name for name in programs if _found(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def _files(program: str) -> list[str]:
    path = _found(program)
    assert path is not None, program
    shown = subprocess.run(["ldd", path], check=True, capture_output=True, text=True).stdout
    return [path, *(word for line in shown.splitlines() for word in line.split() if word[0] == "/")]


def _found(program: str) -> str | None:
    if "/" in program:
        return program
    return shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin")
