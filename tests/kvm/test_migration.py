"""A machine is copied while it runs: the copy equals the machine at its pause."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest

from tests import guests
from tests.virtio_driver import DriverQueue
from vmm_kvm.arch.x86.bios import FirmwareImage
from vmm_kvm.bits import MIB, PAGE_SIZE
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import install_kick_signal
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.machine import Machine
from vmm_kvm.machine.spec import MachineSpec, Outcome
from vmm_kvm.machine.state import MachineState, restore, save
from vmm_kvm.memory import GuestMemory
from vmm_kvm.primitives import Vmm
from vmm_kvm.snapshot import state as states
from vmm_kvm.snapshot.fds import FdSink, FdSource
from vmm_kvm.snapshot.manifest import Host, Manifest, Owner
from vmm_kvm.snapshot.precopy import Plan, Progress, copy_running
from vmm_kvm.snapshot.state import State
from vmm_kvm.snapshot.stream import StreamReader
from vmm_kvm.virtio.queue import Virtqueue

pytestmark = pytest.mark.kvm

SIZE = 8 * MIB
PATIENCE_S = 60.0
PLAN = Plan(waits=True)
PAGES = 96
"""Pages that the guest writes to, each in turn, from 0x10000 on."""

# It counts in each page, and in a register that is part of the state.
DIRTYING = b"".join(
    (
        bytes.fromhex("6631db"),  # xor %ebx, %ebx
        bytes.fromhex("b80010"),  # again: mov $0x1000, %ax
        bytes.fromhex("8ed8"),  # next: mov %ax, %ds
        bytes.fromhex("6643"),  # inc %ebx
        bytes.fromhex("66891e1000"),  # mov %ebx, 0x10
        bytes.fromhex("050001"),  # add $0x100, %ax
        b"\x3d" + (0x1000 + PAGES * 0x100).to_bytes(2, "little"),  # cmp $end, %ax
        bytes.fromhex("72ef"),  # jb next
        bytes.fromhex("ebea"),  # jmp again
    )
)


@dataclass
class Stand:
    """Machines with a guest that writes to its memory all the time."""

    vmm: Vmm
    loop: EventLoop
    spec: MachineSpec
    outcomes: list[Outcome] = field(default_factory=list)

    @contextmanager
    def machine(self, memory: GuestMemory | None = None) -> Iterator[Machine]:
        """Make one; with `memory`, for a state."""
        with Machine(
            self.spec,
            self.vmm,
            self.loop,
            transmit=lambda _: None,
            on_receive_room=lambda: None,
            on_outcome=self.outcomes.append,
            is_restored=memory is not None,
            memory=memory,
        ) as machine:
            yield machine


@pytest.fixture
def stand() -> Iterator[Stand]:
    """Make a stand."""
    install_kick_signal()
    rom = guests.firmware(DIRTYING)
    spec = MachineSpec(
        image=FirmwareImage("dirtying", rom, len(rom)), memory_size=SIZE, cpus=1, name="dirtying"
    )
    with Kvm() as kvm, Vmm(kvm) as vmm, EventLoop() as loop:
        yield Stand(vmm, loop, spec)


def manifest(machine: Machine) -> Manifest:
    """Return a manifest of a machine."""
    regions = tuple((region.gpa, region.size) for region in machine.memory.regions)
    return Manifest(
        name="dirtying",
        created_ns=0,
        host=Host("6.1", 0),
        cpuid=(),
        owner=Owner(None, None),
        memory_size=SIZE,
        cpus=1,
        regions=regions,
        state_size=0,
    )


@dataclass
class Sent:
    """The data that went through a pair of sockets."""

    arrived: GuestMemory
    state: MachineState
    memory: bytes
    """The source's memory, at its pause."""
    progress: list[Progress]


@contextmanager
def sent(
    machine: Machine, meanwhile: Callable[[], None] = lambda: None, plan: Plan = PLAN
) -> Iterator[Sent]:
    """Copy a machine while it runs; `meanwhile` is called at the beginning of each round."""
    ours, theirs = socket.socketpair()
    failures: list[BaseException] = []
    progress: list[Progress] = []
    kept: list[bytes] = []

    def halt() -> bytes:
        machine.pause()
        saved = save(machine)
        kept.append(machine.memory.read(0, SIZE))
        return states.encode(State(saved.parts, saved.blobs))

    def note(at: Progress) -> None:
        progress.append(at)
        meanwhile()

    def write() -> None:
        dirty = machine.dirty_pages()
        try:
            assert not dirty.begin()
            with FdSink(ours.detach(), PATIENCE_S) as sink:
                copy_running(
                    sink,
                    manifest(machine),
                    machine.memory,
                    dirty,
                    halt,
                    plan=lambda: plan,
                    on_progress=note,
                )
        except BaseException as err:  # noqa: BLE001 - the test raises it
            failures.append(err)
        finally:
            dirty.end()

    thread = threading.Thread(target=write)
    thread.start()
    with GuestMemory(((0, SIZE),), is_private=True) as memory:
        try:
            with FdSource(theirs.detach(), PATIENCE_S) as source:
                data = StreamReader(source).read_machine(memory)
        finally:
            thread.join(PATIENCE_S)
            for failure in failures:
                raise failure
        state = states.decode(data)
        yield Sent(memory, MachineState(dict(state.parts), dict(state.blobs)), kept[0], progress)


def differing(one: bytes, other: bytes) -> list[int]:
    """Return the numbers of the pages that differ."""
    return [
        at // PAGE_SIZE
        for at in range(0, SIZE, PAGE_SIZE)
        if one[at : at + PAGE_SIZE] != other[at : at + PAGE_SIZE]
    ]


def counted(memory: GuestMemory) -> list[int]:
    """Return the guest's counter in each page."""
    return [
        int.from_bytes(memory.read(0x10010 + PAGE_SIZE * page, 4), "little")
        for page in range(PAGES)
    ]


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_guest_that_writes_all_the_time(stand: Stand) -> None:
    """The copy equals the source at its pause, after several rounds, and runs on."""
    with stand.machine() as first:
        first.start()
        wait_for(lambda: all(counted(first.memory)))
        with sent(first) as arrived:
            assert differing(arrived.memory, arrived.arrived.read(0, SIZE)) == []
            assert len(arrived.progress) > 1
            before = counted(arrived.arrived)
            assert all(before)
            with stand.machine(arrived.arrived) as second:
                restore(second, arrived.state)
                second.start()
                second.resume()
                wait_for(lambda: min(counted(second.memory)) > max(before))
    assert not stand.outcomes


def test_what_fw_cfg_writes_is_sent(stand: Stand) -> None:
    """A file that fw_cfg's DMA has put into guest memory meanwhile arrives."""
    with stand.machine() as first:
        first.start()
        at = 0x70_0000
        first.memory.write(at, bytes(PAGE_SIZE))

        def ask() -> None:
            # Select the signature (0) and read it: control, length, address, all big-endian.
            request = (0xA).to_bytes(4, "big") + (4).to_bytes(4, "big")
            first.memory.write(at + 0x2000, request + (at + 0x800).to_bytes(8, "big"))
            first.fw_cfg.write(4, 4, 0)
            first.fw_cfg.write(8, 4, int.from_bytes((at + 0x2000).to_bytes(4, "big"), "little"))

        with sent(first, ask) as arrived:
            assert arrived.arrived.read(at + 0x800, 4) == b"QEMU"
            assert differing(arrived.memory, arrived.arrived.read(0, SIZE)) == []


def test_what_a_device_writes_is_sent(stand: Stand) -> None:
    """Data that a device of this process has written meanwhile arrive, and so does its ring."""
    with stand.machine() as first:
        first.start()
        driver = DriverQueue(first.memory.view(0, SIZE), base=0x60_0000)
        queue = Virtqueue(first.memory, driver.ring, 0)
        written: list[bytes] = []

        def serve() -> None:
            data = f"piece {len(written)}".encode()
            driver.add((0x68_0000 + PAGE_SIZE * len(written), 64, True))
            chain = queue.pop()
            assert chain is not None
            chain.writable[0][: len(data)] = data
            queue.push(chain, len(data))
            written.append(data)

        with sent(first, serve) as arrived:
            assert len(written) > 1
            for number, data in enumerate(written):
                assert arrived.arrived.read(0x68_0000 + PAGE_SIZE * number, len(data)) == data
            assert differing(arrived.memory, arrived.arrived.read(0, SIZE)) == []


LARGE = 5 << 30
BLOCK = 128 * MIB
"""Of the memory that a block of a log or bitmap stands for; a device's mark is for 8 pages."""
MARKED = 8 * PAGE_SIZE


def test_few_changes_of_large_memory_are_found(stand: Stand) -> None:
    """In both regions, across the borders of blocks and chunks, each once, and none besides."""
    spec = MachineSpec(image=stand.spec.image, memory_size=LARGE, cpus=1, name="large")
    with replace(stand, spec=spec).machine() as machine:
        dirty, memory = machine.dirty_pages(), machine.memory
        low, high = memory.regions
        assert not dirty.begin()
        try:
            found = dirty.find()
            assert sum(size for _, size in dirty.take()) == found
            for gpa in (MIB, BLOCK - 1, 3 * BLOCK, low.end - 1, high.gpa, high.end - 1):
                memory.writes.mark(gpa, 2 if gpa == BLOCK - 1 else 1)
            assert dirty.find() == dirty.find() == 7 * MARKED
            assert list(dirty.take()) == [
                (MIB, MARKED),
                (BLOCK - MARKED, MARKED),
                (BLOCK, MARKED),
                (3 * BLOCK, MARKED),
                (low.end - MARKED, MARKED),
                (high.offset, MARKED),
                (LARGE - MARKED, MARKED),
            ]
            assert dirty.find() == 0
            dirty.begin_all()
            assert dirty.find() == LARGE
            assert sum(size for _, size in dirty.take()) == LARGE
        finally:
            dirty.end()
