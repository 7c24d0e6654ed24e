"""Frames of a machine's stream and its disks; what is read is hostile."""

from __future__ import annotations

import random
import struct

import pytest

from tests.unit.snapshot.samples import Buffer
from vmm_kvm.errors import SnapshotError
from vmm_kvm.snapshot.handover import await_wanted_disks, failed, wanted_disks
from vmm_kvm.snapshot.storage import DiskPart, StorageReader, StorageWriter

SIZES = [1 << 20, 0, 4 << 20]
HEAD = 12 + 8 * len(SIZES)


def stream() -> bytes:
    """Return frames of two disks, and of a machine's stream around them."""
    buffer = Buffer()
    writer = StorageWriter(buffer, SIZES)
    writer.write(b"manifest")
    writer.write_data(0, 4096, b"x" * 8192)
    writer.write(b"y" * (3 << 19))
    writer.write_zeros(2, 0, 4 << 20)
    writer.finish_disks()
    writer.write(b"end")
    return bytes(buffer.data)


def read(data: bytes, wanted: tuple[int, ...] = (0, 2)) -> tuple[bytes, list[DiskPart], bool]:
    """Return the machine's stream, the parts of disks, and whether these are complete."""
    reader = StorageReader(Buffer(data, most=5000))
    assert reader.sizes == SIZES
    begin = bytearray(8)
    view = memoryview(begin)
    while view:
        view = view[reader.readinto(view) :]
    reader.want(wanted)
    inner, parts = bytes(begin), []
    while len(inner) < 8 + (3 << 19) + 3:
        got = reader.next()
        if isinstance(got, DiskPart):
            parts.append(got)
        elif got is not None:
            inner += got
    return inner, parts, reader.are_disks_done


def test_all_of_it_arrives() -> None:
    """The stream is as it was written, and each part of a disk is at its place."""
    inner, parts, are_done = read(stream())
    assert inner == b"manifest" + b"y" * (3 << 19) + b"end"
    assert parts == [
        DiskPart(0, 4096, 8192, memoryview(b"x" * 8192)),
        DiskPart(2, 0, 4 << 20, None),
    ]
    assert are_done


def part(kind: int, disk: int, offset: int, size: int, data: bytes = b"") -> bytes:
    """Return the beginning of a stream, and then this frame."""
    frame = struct.pack("<BBxxIQQ", kind, disk, len(data), offset, size)
    return stream()[: HEAD + 24 + 8] + frame + data


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"VMMKVM\0S" + stream()[8:], "incompatible dump signature"),
        (stream()[:8] + struct.pack("<I", 33), "disks: 33, at most 32 are possible"),
        (stream()[:12] + struct.pack("<QQQ", 511, 0, 0), "disks: one of 511 bytes"),
        (stream()[:HEAD] + struct.pack("<BBxxIQQ", 2, 0, 0, 0, 512), "disks: before the manifest"),
        (stream()[:-1], "the stream ends too early"),
        (part(1, 1, 0, 512, bytes(512)), "disks: 512 bytes at 0x0 of disk 1: out of place"),
        (part(1, 7, 0, 512, bytes(512)), "disks: 512 bytes at 0x0 of disk 7: out of place"),
        (part(1, 0, 1 << 20, 512, bytes(512)), "of disk 0: out of place"),
        (part(2, 2, 0, (4 << 20) + 512), "of disk 2: out of place"),
        (part(2, 2, 1, 512), "disks: 512 bytes at 0x1: no blocks"),
        (part(1, 0, 0, 1024, bytes(512)), "disks: a frame that is none"),
        (part(9, 0, 0, 0), "disks: a frame that is none"),
        (part(3, 0, 0, 0, bytes(32)), "disks: the checksum is wrong"),
        (part(0, 0, 0, 0), "a frame of 0 bytes"),
    ],
)
def test_what_is_refused(data: bytes, text: str) -> None:
    """Frames that are wrong are refused, with one line."""
    with pytest.raises(SnapshotError, match=text) as caught:
        read(data)
    assert "\n" not in str(caught.value)


def test_a_damaged_disk_is_found() -> None:
    """One changed byte of a disk's data makes the checksum wrong."""
    data = bytearray(stream())
    data[HEAD + 24 + 8 + 24 + 100] ^= 1
    with pytest.raises(SnapshotError, match="the checksum is wrong"):
        read(bytes(data))


def test_any_bytes_end_in_one_line() -> None:
    """Whatever is mutated, the reader ends with an error of its own, or with all that was sent."""
    chance = random.Random(3)
    whole = stream()
    for _ in range(300):
        data = bytearray(whole[: chance.choice([len(whole), HEAD + 200])])
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(min(len(data), HEAD + 200))] = chance.randrange(256)
        with pytest.raises(SnapshotError) as caught:
            everything(bytes(data))
        assert "\n" not in str(caught.value)


def everything(data: bytes) -> None:
    """Read until something is wrong, the end at the latest."""
    reader = StorageReader(Buffer(data))
    reader.want((0, 2))
    while True:
        reader.next()


def test_which_disks_are_wanted() -> None:
    """The receiver's choice arrives; anything else is refused, by what it says."""
    assert await_wanted_disks(Answers(wanted_disks([0, 2])), 3) == {0, 2}
    assert await_wanted_disks(Answers(wanted_disks([])), 3) == frozenset()
    for line, text in (
        (wanted_disks([3]), "the receiver says: vmm-kvm: copy disks: 3"),
        (b"vmm-kvm: copy disks: x\n", "the receiver says: vmm-kvm: copy disks: x"),
        (failed("no room"), "the receiver says: no room"),
        (b"", "the connection to the receiver has ended"),
    ):
        with pytest.raises(SnapshotError, match=text):
            await_wanted_disks(Answers(line), 3)


class Answers(Buffer):
    """What a receiver says."""

    def cancel_no_more(self) -> None:
        """Do nothing."""
