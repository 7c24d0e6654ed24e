"""A file that keeps a journal, so that a crash at any moment can be replayed afterwards.

Two kinds of crash: of the process, after which the file has every write so far; and of the
host, after which it has those before the last fdatasync, and of each later sector the old contents
or any that were written since.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vmm_kvm.block.file import HostFile
from vmm_kvm.block.image import StoredImage
from vmm_kvm.block.qcow2.check import Report, check
from vmm_kvm.block.qcow2.header import read_header
from vmm_kvm.block.qcow2.image import Qcow2Image

SECTOR = 512


class Write(NamedTuple):
    """One transfer to the file; a hole is a write of zeros that does not extend the file."""

    offset: int
    data: bytes
    is_hole: bool = False


class Journal(HostFile):
    """A file that notes its writes, besides doing them."""

    __slots__ = ("events",)

    def __init__(self, path: str) -> None:
        """Open the file at `path`."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        super().__init__(descriptor, path, is_read_only=False)
        self.events: list[Write | None] = []
        """Events in order; None is a sync."""

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write, and note it."""
        super().writev(offset, buffers)
        self.events.append(Write(offset, b"".join(buffers)))

    def punch(self, offset: int, size: int) -> bool:
        """Punch, and note it."""
        done = super().punch(offset, size)
        if done:
            self.events.append(Write(offset, bytes(size), is_hole=True))
        return done

    def zero(self, offset: int, size: int) -> None:
        """Clear, and note it."""
        super().zero(offset, size)
        self.events.append(Write(offset, bytes(size), is_hole=True))

    def sync(self) -> None:
        """Synchronise, and note it."""
        super().sync()
        self.events.append(None)


def open_journal(path: str, base: StoredImage | None) -> tuple[Journal, Qcow2Image]:
    """Open an image for writing, whose file notes the writes."""
    journal = Journal(path)
    return journal, Qcow2Image(journal, read_header(journal), base)


def after_kill(before: bytes, events: Sequence[Write | None]) -> bytearray:
    """Return the file as a process that died after `events` leaves it."""
    data = bytearray(before)
    for event in events:
        if event is not None:
            _apply(data, event)
    return data


def after_power_loss(
    before: bytes, events: Sequence[Write | None], chance: random.Random
) -> bytearray:
    """Return the file as a host that died after `events` may leave it."""
    synced = max((number + 1 for number, event in enumerate(events) if event is None), default=0)
    data = after_kill(before, events[:synced])
    share = chance.choice((0.1, 0.5, 0.9))
    for event in events[synced:]:
        if event is None:
            continue
        for start in range(0, len(event.data), SECTOR):
            if chance.random() < share:
                piece = event.data[start : start + SECTOR]
                _apply(data, Write(event.offset + start, piece, event.is_hole))
    return data


def _apply(data: bytearray, write: Write) -> None:
    end = write.offset + len(write.data)
    if len(data) < end and not write.is_hole:
        data.extend(bytes(end - len(data)))
    piece = data[write.offset : end]
    data[write.offset : end] = write.data[: len(piece)]


def checked(path: str) -> Report:
    """Check an image."""
    file = HostFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), path, is_read_only=True)
    try:
        return check(file, read_header(file))
    finally:
        file.close()


def contents(path: str, base: StoredImage | None) -> bytes:
    """Return the whole disk."""
    file = HostFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), path, is_read_only=True)
    image = Qcow2Image(file, read_header(file), base)
    data = bytearray(image.size)
    image.readv(0, [memoryview(data)])
    file.close()  # not the image: its base stays open
    return bytes(data)


class History:
    """The possible contents of each sector after a crash: the flushed ones, or any later ones."""

    def __init__(self, disk: bytes) -> None:
        """Begin with a disk that is durable."""
        self._versions = [[disk[at : at + SECTOR]] for at in range(0, len(disk), SECTOR)]

    def write(self, offset: int, data: bytes) -> None:
        """Note a write of whole sectors."""
        for at in range(0, len(data), SECTOR):
            self._versions[(offset + at) // SECTOR].append(data[at : at + SECTOR])

    def flush(self) -> None:
        """Note that all writes are durable now."""
        self._versions = [versions[-1:] for versions in self._versions]

    def copy(self) -> History:
        """Return this history as it is now."""
        twin = History(b"")
        twin._versions = [list(versions) for versions in self._versions]
        return twin

    def lost(self, disk: bytes) -> list[int]:
        """Return the sectors of `disk` with impossible contents."""
        return [
            number
            for number, versions in enumerate(self._versions)
            if disk[number * SECTOR : (number + 1) * SECTOR] not in versions
        ]


def write_file(path: Path, data: bytes | bytearray) -> str:
    """Write a file and return its path."""
    path.write_bytes(data)
    return str(path)
