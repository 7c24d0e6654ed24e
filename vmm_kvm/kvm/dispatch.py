"""The hot path of the whole machine: enter the guest, serve the access it came out for, again.

After an exit the processor's caches and predictions are cold, so what counts is how little is
touched: a port access takes one look at the reason, one at the whole description of the access,
and one in a table that leads to the device's method. Nothing is allocated.
"""

from collections.abc import Callable

from vmm_kvm.bus import Bus
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.exits import MMIO_ACCESS, Exit, IoExit, MmioExit
from vmm_kvm.kvm.ioctl import enter
from vmm_kvm.kvm.vcpu import Vcpu

# What a port access needs: the device's lock and methods, the offset, the size in bytes, where the
# data lie, and whether it is a write.
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

# A guest may use any of 65536 ports in many ways: forget what was learnt when it has used many.
_KNOWN_ACCESSES = 4096


def dispatch(
    vcpu: Vcpu,
    pio: Bus,
    mmio: Bus,
    leave: Callable[[Vcpu, Exit], bool],
    drain: Callable[[Vcpu], None] | None = None,
) -> None:
    """Run `vcpu` and serve its accesses until `leave` returns False for another exit.

    Called on the vCPU's thread. `drain` is called before every exit is served, for accesses that
    KVM has collected.

    Raises:
        KvmError: KVM_RUN failed.

    Source: KVM API §4.10, §5.
    """
    vcpu.bind_thread()
    fd, request = vcpu.fd, abi.KVM_RUN
    field = abi.kvm_run.exit_reason
    page = memoryview(vcpu.kvm_run).cast("B")
    reasons = page[field.offset : field.offset + field.size].cast("I")
    io, io_words = vcpu.io_exit, vcpu.io_exit.words
    mmio_exit, mmio_words = vcpu.mmio_exit, vcpu.mmio_exit.words
    io_reason, mmio_reason = abi.KVM_EXIT_IO, abi.KVM_EXIT_MMIO
    known: dict[int, _Access] = {}
    widths: dict[int, tuple[int, memoryview, bool]] = {}
    version = pio.version
    while True:
        try:
            enter(fd, request)
        except OSError:
            # A kick, a start-up IPI or a failure; all of them persist until run() tells which.
            reason = vcpu.run()
            if reason is not io and reason is not mmio_exit:
                if not leave(vcpu, reason):
                    return
                continue
        if drain:
            drain(vcpu)
        kind = reasons[0]
        if kind == io_reason:
            if version != pio.version:
                version = pio.version
                known.clear()
            try:
                acquire, release, read, write, offset, size, items, is_write = known[io_words[0]]
            except KeyError:
                _learn(io, pio, known)
                _serve_io(io, pio)
                continue
            acquire()
            try:
                if is_write:
                    write(offset, size, items[0])
                else:
                    items[0] = read(offset, size)
            finally:
                release()
        elif kind == mmio_reason:
            try:
                size, items, is_write = widths[mmio_words[2] & MMIO_ACCESS]
            except KeyError:
                if mmio_exit.len not in mmio_exit.views:
                    _serve_split_mmio(mmio_exit, mmio)
                    continue
                size, items = mmio_exit.len, mmio_exit.views[mmio_exit.len]
                is_write = mmio_exit.is_write != 0
                widths[mmio_words[2] & MMIO_ACCESS] = size, items, is_write
            if is_write:
                mmio.write(mmio_words[0], size, items[0])
            else:
                items[0] = mmio.read(mmio_words[0], size)
        elif not leave(vcpu, vcpu.latest_exit()):
            return


def _learn(io: IoExit, pio: Bus, table: dict[int, _Access]) -> None:
    """Note how to serve the next access like this one, if it is a single one to one device."""
    claim = pio.find(io.port)
    if io.count != 1 or io.port + io.size > claim.end:
        return
    if len(table) >= _KNOWN_ACCESSES:
        table.clear()
    base, _, acquire, release, read, write = claim
    offset, size = io.port - base, io.size
    table[io.words[0]] = acquire, release, read, write, offset, size, io.views[size], io.is_write


def _serve_io(io: IoExit, pio: Bus) -> None:
    """Serve a port access of any kind; INS and OUTS one item at a time, as devices see them."""
    items = io.views[io.size]
    for i in range(io.count):
        if io.is_write:
            pio.write(io.port, io.size, items[i])
        else:
            items[i] = pio.read(io.port, io.size)


def _serve_split_mmio(reason: MmioExit, mmio: Bus) -> None:
    """Serve an access of odd size, part of one that crosses a page, byte by byte."""
    data = reason.data
    for i in range(reason.len):
        if reason.is_write:
            mmio.write(reason.phys_addr + i, 1, data[i])
        else:
            data[i] = mmio.read(reason.phys_addr + i, 1)
