"""A vCPU: running it, and bringing it out of the guest.

Kicking. A vCPU runs on one thread, that of its first `run()` until another one calls
`bind_thread()`. `kick()` may come from any thread and ends the current or the next `run()`, which
returns Interrupted: it first sets `immediate_exit`, which the kernel looks at when KVM_RUN begins,
then signals the vCPU's thread, which ends a KVM_RUN that has looked already. The thread is known
before it first enters the kernel, so whatever moment the kick falls into, one of the two works. A
signal that comes late finds the thread outside KVM_RUN and does nothing, because its handler does
nothing. The vCPU's thread clears `immediate_exit` before it looks at what the kicker wants: a
request made before that is seen, and a later one kicks again.

The one lock, that of the coalesced ring, belongs to the VM, whose vCPUs share the ring. A device's
lock may be taken while it is held, never the other way round.
"""

import ctypes
import mmap
import os
import signal
import struct
import threading
from collections.abc import Callable
from errno import EAGAIN, EINTR
from typing import Self, TypeAlias

from vmm_kvm.bits import PAGE_SIZE
from vmm_kvm.errors import KvmError, VmmError
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.exits import Exit, Exits
from vmm_kvm.kvm.ioctl import enter, operation, signal_thread
from vmm_kvm.kvm.vcpu_state import VcpuState
from vmm_kvm.libc import map_over

KICK_SIGNAL = signal.SIGRTMIN

_RING_HEADER = ctypes.sizeof(abi.kvm_coalesced_mmio_ring)
_RING_ENTRIES = (PAGE_SIZE - _RING_HEADER) // ctypes.sizeof(abi.kvm_coalesced_mmio)
_ENTRY = struct.Struct("=QIIQ")  # a kvm_coalesced_mmio, its data as one integer
assert _ENTRY.size == ctypes.sizeof(abi.kvm_coalesced_mmio)
_MASKS = tuple((1 << 8 * size) - 1 for size in range(9))

Write: TypeAlias = Callable[[int, int, int], None]
"""Takes the address, the size in bytes, and the value."""

_RUN = abi.KVM_RUN


def install_kick_signal() -> None:
    """Give SIGRTMIN a handler that does nothing, so that it only interrupts; idempotent.

    Called once per process, on its main thread, before any `kick()`.

    Raises:
        ValueError: this is not the main thread.
    """
    signal.signal(KICK_SIGNAL, _ignore)


def _ignore(_number: int, _frame: object) -> None:
    pass


class Vcpu(VcpuState):
    """One vCPU; a context manager that owns its file descriptor and mapping.

    `kvm_run` is the mapped page itself, for the fields that have no method here; `io_exit` and
    `mmio_exit` are the objects that `run()` returns for accesses; `collected_ends` are the first
    and the last index of the ring of collected writes, equal while there are none.

    All methods but `kick` belong to the thread that runs the vCPU, or to any single thread while
    none does.
    """

    __slots__ = (
        "_by_reason",
        "_exits",
        "_mmap_size",
        "_native_id",
        "_reason",
        "_ring",
        "_ring_bytes",
        "_ring_lock",
        "collected_ends",
        "index",
        "io_exit",
        "kvm_run",
        "mmio_exit",
    )

    def __init__(
        self,
        fd: int,
        index: int,
        mmap_size: int,
        *,
        ring_page: int,
        ring_lock: threading.Lock,
        xsave_size: int,
    ) -> None:
        """Use `fd`, a new vCPU; takes ownership of it. `Vm.create_vcpu` calls this.

        `mmap_size` is in bytes; `ring_page` is where the coalesced ring lies in the mapping, in
        pages, or 0 for nowhere; `xsave_size` is KVM_CAP_XSAVE2's value, bytes.

        Raises:
            OSError: the mapping failed; `fd` is closed.
        """
        super().__init__(fd, xsave_size)
        self.index = index
        self._mmap_size = mmap_size
        self._ring_lock = ring_lock
        self._native_id = 0  # of the thread that runs the vCPU; 0 before the first `run()`
        start = ring_page * PAGE_SIZE
        has_ring = 0 < start <= mmap_size - PAGE_SIZE
        try:
            page = memoryview(mmap.mmap(fd, mmap_size))
            self._lay_out(page, page[start : start + PAGE_SIZE] if has_ring else None)
        except BaseException:
            os.close(fd)
            raise

    def _lay_out(self, page: memoryview, ring: memoryview | None) -> None:
        self.kvm_run = abi.kvm_run.from_buffer(page)
        self._exits = Exits(page)
        self._by_reason = self._exits.by_reason
        self.io_exit = self._exits.io
        self.mmio_exit = self._exits.mmio
        reason = abi.kvm_run.exit_reason
        self._reason = page[reason.offset : reason.offset + reason.size].cast("I")
        if ring is None:
            ring = memoryview(bytearray(PAGE_SIZE))
        self.collected_ends = ring[:_RING_HEADER].cast("I")
        self._ring = ring
        entries = ring[_RING_HEADER : _RING_HEADER + _RING_ENTRIES * _ENTRY.size]
        self._ring_bytes = entries[abi.kvm_coalesced_mmio.data.offset :: _ENTRY.size]

    def close(self) -> None:
        """Close the file descriptor and drop the mapping; idempotent. No thread may be in `run()`.

        An exit object that is still held keeps the mapping, and with it the VM in the kernel.
        """
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
            self._lay_out(memoryview(bytearray(2 * PAGE_SIZE)), None)  # so that kick() stays safe

    def take_over(self, new: "Vcpu") -> None:
        """Become `new`, under this one's descriptor and addresses; closes `new`.

        In a forked child, to which the kernel refuses the parent's vCPU. Every view of the old
        mapping shows the new one.

        Raises:
            OSError: the host refused.
        """
        os.dup2(new.fd, self.fd, inheritable=False)
        map_over(ctypes.addressof(self.kvm_run), self._mmap_size, self.fd)
        self._native_id = 0
        new.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Running

    def run(self) -> Exit:
        """Run the guest until its next exit, and return that.

        The object returned is valid until the next call. An access that the last exit described is
        completed first, so its answer must be in place.

        Raises:
            KvmError: KVM_RUN failed for another reason than a signal.

        Source: KVM API §4.10, §5.
        """
        if not self._native_id:
            self.bind_thread()
        if enter(self.fd, _RUN, 0) < 0:
            return self._not_entered()
        try:
            return self._by_reason[self._reason[0]]
        except IndexError:
            return self._exits.find(self._reason[0])

    def latest_exit(self) -> Exit:
        """Return the latest exit; for callers that enter the guest without `run()`."""
        return self._exits.find(self._reason[0])

    def bind_thread(self) -> None:
        """Make the calling thread the one that `kick()` interrupts.

        The first `run()` does that; afterwards it is for a thread that takes the vCPU over.
        """
        self._native_id = threading.get_native_id()

    def _not_entered(self) -> Exit:
        while (errno := ctypes.get_errno()) == EAGAIN:
            # A start-up IPI has just arrived: the vCPU can run now.
            if enter(self.fd, _RUN, 0) >= 0:
                return self._exits.find(self._reason[0])
        if errno == EINTR:
            return self._exits.interrupted
        raise KvmError(operation(_RUN), errno)

    def kick(self) -> None:
        """End the current `run()`, or the next one if none is under way; any thread.

        Every `run()` returns Interrupted until `clear_immediate_exit()`. Needs
        `install_kick_signal()`; without it the signal would end the process.

        Raises:
            VmmError: no handler is installed.
        """
        if signal.getsignal(KICK_SIGNAL) is signal.SIG_DFL:
            raise VmmError("kick: install_kick_signal() has not been called")
        self.kvm_run.immediate_exit = 1
        native_id = self._native_id
        if native_id and self.fd >= 0:
            signal_thread(native_id, KICK_SIGNAL)

    def clear_immediate_exit(self) -> None:
        """Let the next `run()` enter the guest again; on the thread that runs the vCPU."""
        self.kvm_run.immediate_exit = 0

    def set_immediate_exit(self) -> None:
        """Let the next `run()` only complete the last exit's access, then return Interrupted."""
        self.kvm_run.immediate_exit = 1

    def write_collected(self, pio: Write, mmio: Write) -> bool:
        """Do the writes that KVM collected for this VM, oldest first; tells if there were any.

        `pio` and `mmio` are given address, size and value. The ring is the VM's: any vCPU empties
        it for all, under a lock, so that the writes take effect in their order.
        """
        ends = self.collected_ends
        if ends[0] == ends[1]:
            return False
        with self._ring_lock:
            last = ends[1]  # what other vCPUs add meanwhile is for the next call: a bounded loop
            while (first := ends[0]) != last:
                address, size, is_pio, value = _ENTRY.unpack_from(
                    self._ring, _RING_HEADER + first * _ENTRY.size
                )
                try:
                    (pio if is_pio else mmio)(address, size, value & _MASKS[size])
                finally:
                    ends[0] = (first + 1) % _RING_ENTRIES  # the kernel may use the place again
        return True

    def write_collected_bytes(self, write: Callable[[bytes], None]) -> bool:
        """Do the same for a VM that collects nothing but bytes for one address, all at once."""
        ends = self.collected_ends
        with self._ring_lock:
            first, last = ends[0], ends[1]
            if first == last:
                return False
            if first < last:
                data = bytes(self._ring_bytes[first:last])
            else:
                data = bytes(self._ring_bytes[first:]) + bytes(self._ring_bytes[:last])
            try:
                write(data)
            finally:
                ends[0] = last  # the kernel may use the places again
        return True
