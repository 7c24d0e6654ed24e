"""A small machine in written form, and its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vmm_kvm.bits import MIB, PAGE_SIZE
from vmm_kvm.memory import GuestMemory
from vmm_kvm.snapshot import state as states
from vmm_kvm.snapshot.cpu import CpuidRecord
from vmm_kvm.snapshot.manifest import Boot, Disk, Firmware, Host, Interface, Manifest, Owner
from vmm_kvm.snapshot.ram import runs
from vmm_kvm.snapshot.state import State
from vmm_kvm.snapshot.stream import LiveWriter, write_stream

RANGES = ((0, 2 * MIB), (4096 * MIB, MIB))
"""Guest-physical address and size of each region."""
CPUID = (
    CpuidRecord(0x0, 0, 13, 0x756E6547, 0x6C65746E, 0x49656E69),
    CpuidRecord(0x1, 0, 0x806EA, 0x10800, 0xFFFA3203, 0x178BFBFF),
    CpuidRecord(0x7, 0, 0, 0x29C67AF, 0x40, 0),
    CpuidRecord(0xD, 0, 7, 0x340, 0x340, 0),
    CpuidRecord(0x80000001, 0, 0, 0, 0x121, 0x2C100800),
)
STATE = State({"uart0": {"version": 1, "lcr": 3}, "rom": {}}, {"vcpu0/regs": bytes(range(64))})
STATE_BYTES = states.encode(STATE)
MANIFEST = Manifest(
    name="web",
    memory_size=3 * MIB,
    cpus=1,
    regions=RANGES,
    state_size=len(STATE_BYTES),
    created_ns=1_700_000_000_000_000_000,
    host=Host("6.1.0", 2_400_000),
    cpuid=CPUID,
    owner=Owner(1000, None),
    boot=Boot(firmware="bios", device="disk"),
    firmware=Firmware("bios.bin", 131072),
    disks=(Disk("/vm/disk.qcow2", "qcow2", "serial", 2),),
    cdrom="/vm/install.iso",
    interfaces=(Interface("fe:e1:bb:d1:00:01", 1500, switch="uplink"),),
)
PAGES = {0: b"\1" * PAGE_SIZE, 2 * MIB - PAGE_SIZE: b"end of low memory".ljust(PAGE_SIZE, b"\0")}
"""The contents of RAM, by the guest-physical address."""
HIGH = (4096 * MIB + 5 * PAGE_SIZE, bytes(range(256)) * 32)


class Buffer:
    """Both ends of a stream, in memory: written data are read, a few bytes at a time."""

    def __init__(self, data: bytes = b"", most: int = 1 << 20) -> None:
        self.data = bytearray(data)
        self.position = 0
        self._most = most

    def write(self, data: bytes) -> None:
        """Take all of it."""
        self.data += data

    def readinto(self, view: memoryview) -> int:
        """Return at most as many bytes as the buffer gives at once."""
        piece = self.data[self.position : self.position + min(len(view), self._most)]
        view[: len(piece)] = piece
        self.position += len(piece)
        return len(piece)


@contextmanager
def filled(*, is_private: bool = False) -> Iterator[GuestMemory]:
    """Make the sample's memory."""
    with empty(is_private=is_private) as memory:
        for gpa, data in (*PAGES.items(), HIGH):
            memory.write(gpa, data)
        yield memory


@contextmanager
def empty(*, is_private: bool = False) -> Iterator[GuestMemory]:
    """Make memory of the sample's size, all zeros."""
    with GuestMemory(RANGES, "sample", is_private=is_private) as memory:
        yield memory


def contents(memory: GuestMemory) -> list[bytes]:
    """Return the contents of each region."""
    return [memory.read(region.gpa, region.size) for region in memory.regions]


def stream(manifest: Manifest = MANIFEST, *, compresses: bool = False) -> bytes:
    """Return the sample as a stream."""
    buffer = Buffer()
    with filled() as memory:
        write_stream(buffer, manifest, STATE_BYTES, memory, compresses=compresses)
    return bytes(buffer.data)


def live_stream() -> bytes:
    """Return the sample as a stream of a running machine: everything occurs twice."""
    buffer = Buffer()
    writer = LiveWriter(buffer, MANIFEST)
    with filled() as memory:
        for run in (*runs(memory), *runs(memory)):
            writer.write_run(*run)
    writer.finish(STATE_BYTES)
    return bytes(buffer.data)
