"""The hot path of the whole machine: enter the guest, serve the access that it exited for, repeat.

After an exit the processor's caches and predictors are cold, so the cost depends on how little
memory is touched: an access reads the exit reason, its description, and one entry of a table that
leads to the device's method. Nothing is allocated. The buses empty those tables when their ranges
change.
"""

from collections.abc import Callable
from typing import Protocol

from vmm_kvm.bus import Bus
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.exits import MMIO_ACCESS, Exit, IoExit, MmioExit
from vmm_kvm.kvm.ioctl import enter_fast, entry
from vmm_kvm.kvm.vcpu import Vcpu

# What an access needs: the device's lock and methods, the offset, the size in bytes, where the data
# lie, and whether it is a write.
_Access = tuple[
    Callable[[], bool],
    Callable[[], None],
    Callable[[int, int], int],
    Callable[[int, int, int], None],
    int,
    int,
    memoryview,
    bool,
]

# By the first word of a port access; by the address of an MMIO access.
_Known = dict[int, _Access]

# A guest may use any number of addresses in many ways: drop the look-ups after many.
_KNOWN_ACCESSES = 4096


class Collected(Protocol):
    """Handles the writes that KVM collects."""

    early_read: list[int]
    """The first of `IoExit.words` of a byte's IN that need not wait for them, or 0; its answer."""

    def drain(self, vcpu: Vcpu) -> None:
        """Let all of them take effect; on the thread of `vcpu`."""


def dispatch(vcpu: Vcpu, pio: Bus, mmio: Bus, collected: Collected | None = None) -> Exit:
    """Run `vcpu` and serve its accesses until an exit of another kind; return that exit.

    Called on the thread that the vCPU is bound to. Collected writes take effect before an exit is
    served, except for `Collected.early_read`.

    Raises:
        KvmError: KVM_RUN failed.

    Source: KVM API §4.10, §5.
    """
    arguments = entry(vcpu.fd, abi.KVM_RUN)
    field = abi.kvm_run.exit_reason
    page = memoryview(vcpu.kvm_run).cast("B")
    reasons = page[field.offset : field.offset + field.size].cast("I")
    io, io_words = vcpu.io_exit, vcpu.io_exit.words
    mmio_exit, mmio_words = vcpu.mmio_exit, vcpu.mmio_exit.words
    io_reason, mmio_reason = abi.KVM_EXIT_IO, abi.KVM_EXIT_MMIO
    ends = vcpu.collected_ends
    drain, early_read = (collected.drain, collected.early_read) if collected else (None, [0, 0])
    early_answer = io.views[1]
    ports: _Known = {}
    addresses: dict[int, _Known] = {}  # by the size and direction of the access
    with pio.watched(ports), mmio.watched(addresses):
        while True:
            try:
                result = enter_fast(*arguments)
            except (OSError, ValueError):
                result = -1
            if result < 0:
                # A kick, a start-up IPI or a failure; all of them persist until run() tells which.
                reason = vcpu.run()
                if reason is not io and reason is not mmio_exit:
                    return reason
            kind = reasons[0]
            if kind == io_reason and io_words[0] == early_read[0]:
                early_answer[0] = early_read[1]
                continue
            if drain and ends[0] != ends[1]:
                drain(vcpu)
            if kind == io_reason:
                try:
                    access = ports[io_words[0]]
                except KeyError:
                    _learn_io(io, pio, ports)
                    _serve_io(io, pio)
                    continue
            elif kind == mmio_reason:
                try:
                    access = addresses[mmio_words[2] & MMIO_ACCESS][mmio_words[0]]
                except KeyError:
                    _learn_mmio(mmio_exit, mmio, addresses)
                    _serve_mmio(mmio_exit, mmio)
                    continue
            else:
                return vcpu.latest_exit()
            acquire, release, read, write, offset, size, items, is_write = access
            acquire()
            try:
                if is_write:
                    write(offset, size, items[0])
                else:
                    items[0] = read(offset, size)
            finally:
                release()


def _learn_io(io: IoExit, pio: Bus, known: _Known) -> None:
    """Note how to serve the next access like this one, if it is a single one to one device."""
    if io.count == 1:
        _learn(pio, io.port, io.size, io.views[io.size], io.is_write, known, io.words[0])


def _learn_mmio(exit_: MmioExit, mmio: Bus, addresses: dict[int, _Known]) -> None:
    """Note how to serve the next access like this one, if it is of a usual size."""
    if exit_.len in exit_.views:
        known = addresses.setdefault(exit_.words[2] & MMIO_ACCESS, {})
        address, items = exit_.phys_addr, exit_.views[exit_.len]
        _learn(mmio, address, exit_.len, items, exit_.is_write != 0, known, address)


def _learn(  # noqa: PLR0917 - one access, whole
    bus: Bus, address: int, size: int, items: memoryview, is_write: bool, known: _Known, key: int
) -> None:
    version = bus.version
    base, end, acquire, release, read, write = bus.find(address)
    if address + size > end:
        return
    if len(known) >= _KNOWN_ACCESSES:
        known.clear()
    known[key] = acquire, release, read, write, address - base, size, items, is_write
    if bus.version != version:  # it changed meanwhile, and may have emptied the table too early
        known.clear()


def _serve_io(io: IoExit, pio: Bus) -> None:
    """Serve a port access of any kind; INS and OUTS one item at a time, as devices see them."""
    items = io.views[io.size]
    for i in range(io.count):
        if io.is_write:
            pio.write(io.port, io.size, items[i])
        else:
            items[i] = pio.read(io.port, io.size)


def _serve_mmio(exit_: MmioExit, mmio: Bus) -> None:
    """Serve a memory access of any size; one of odd size crosses a page, and goes byte by byte."""
    size = exit_.len if exit_.len in exit_.views else 1
    items = exit_.views[size]
    for i in range(exit_.len // size):
        if exit_.is_write:
            mmio.write(exit_.phys_addr + i * size, size, items[i])
        else:
            items[i] = mmio.read(exit_.phys_addr + i * size, size)
