"""Finds the pages of RAM that change while a machine runs, for copying it without a pause.

Three kinds of writers: vCPUs and what KVM does for them, which KVM logs; devices of this process;
device processes. The latter two mark a `SharedLog`. Between `begin` and `end` guests are slower:
KVM write-protects copied pages, and maps small pages.

One thread at a time. A page is copied after `clear`, not before: the next `find` sees a write in
between.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmm_kvm.bits import PAGE_SIZE, align_up
from vmm_kvm.kvm import abi
from vmm_kvm.write_log import SharedLog, blocks_set

if TYPE_CHECKING:
    from vmm_kvm.kvm.vm import Vm
    from vmm_kvm.machine.wiring import Devices
    from vmm_kvm.memory import GuestMemory, Region

CHUNK = 1 << 20
"""Bytes of RAM that are cleared, and then copied, at a time; a multiple of 64 pages."""
_CHUNK_BYTES = CHUNK // PAGE_SIZE // 8  # of a bitmap
_CLEAN = bytes(_CHUNK_BYTES)
_WORD = 64  # pages: the kernel reads and writes whole words of bits
_RUN = re.compile("1+")


class DirtyPages:
    """The log of one machine's RAM."""

    def __init__(self, vm: "Vm", memory: "GuestMemory", devices: "Devices") -> None:
        """Log nothing yet; all stay the machine's."""
        self._vm = vm
        self._memory = memory
        self._devices = devices
        self._log: SharedLog | None = None
        self._pending = [_bitmap(0, region) for region in memory.regions]  # bit n for page n
        self._is_manual = False

    def begin(self) -> list[str]:
        """Log from now on; returns the names of devices that cannot: then nothing is logged.

        The log lacks earlier writes, so all of RAM is copied once first.

        Raises:
            KvmError, OSError: the host refuses.
        """
        log = SharedLog(self._memory.regions[-1].end)
        unable = self._devices.log_writes(log)
        if unable:
            log.close()
            return unable
        self._log = log
        try:
            self._memory.log_writes(log.view)
            self._set_up()
        except BaseException:
            self.end()
            raise
        return []

    def _set_up(self) -> None:
        vm, wanted = self._vm, abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
        offered = vm.check_extension(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
        # Pages are write-protected a chunk at a time then, and not all at once in the beginning.
        wanted |= abi.KVM_DIRTY_LOG_INITIALLY_SET & offered
        self._is_manual = bool(offered & abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
        if self._is_manual:
            vm.enable_cap(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, (wanted,))
        self._show(log_dirty=True)

    def _show(self, *, log_dirty: bool) -> None:
        for slot, region in enumerate(self._memory.regions):
            hva = self._memory.hva + region.offset
            self._vm.set_memory_region(slot, region.gpa, region.size, hva, log_dirty=log_dirty)

    def end(self) -> None:
        """Log no more; idempotent.

        Raises:
            KvmError: the host refuses.
        """
        log, self._log = self._log, None
        if log is None:
            return
        self._memory.writes.turn_off()
        self._devices.log_writes(None)
        log.close()
        self._show(log_dirty=False)

    def begin_all(self) -> None:
        """Begin with every page: the first copy is of all of them."""
        for slot, region in enumerate(self._memory.regions):
            self._pending[slot] = _bitmap((1 << region.size // PAGE_SIZE) - 1, region)

    def find(self, *, is_still: bool = False) -> int:
        """Collect changes; returns how many bytes of RAM are to be copied now.

        With `is_still` nothing runs, and nothing is missed.

        Raises:
            KvmError: the host refuses.
        """
        assert self._log is not None
        marked = list(self._log.take())
        if is_still:
            marked += [(gpa, gpa + size) for gpa, size in self._devices.used_rings()]
        total = 0
        for slot, region in enumerate(self._memory.regions):
            pending = self._pending[slot]
            for at, block in blocks_set(self._vm.get_dirty_log(slot, region.size)):
                _add(pending, at, len(block), int.from_bytes(block, "little"))
            for start, end in marked:
                _add(pending, *_pages(region, start, end))
            for _at, block in blocks_set(pending):
                total += int.from_bytes(block, "little").bit_count()
        return total * PAGE_SIZE

    def take(self) -> Iterator[tuple[int, int]]:
        """Yield the changed ranges, ascending: position in RAM, and bytes, at most 1 MiB.

        Each must be copied before the next is taken. Ranges that are not taken are found again.

        Raises:
            KvmError: the host refuses.
        """
        for slot, region in enumerate(self._memory.regions):
            pending = self._pending[slot]
            for at in _chunks(pending):
                chunk = bytes(pending[at : at + _CHUNK_BYTES])
                first = 8 * at
                if self._is_manual:
                    pages = min(8 * _CHUNK_BYTES, region.size // PAGE_SIZE - first)
                    self._vm.clear_dirty_log(slot, first, pages, chunk)
                pending[at : at + len(chunk)] = _CLEAN[: len(chunk)]
                bits = int.from_bytes(chunk, "little")
                for run in _RUN.finditer(f"{bits:b}"[::-1]):
                    start, end = run.span()
                    yield region.offset + (first + start) * PAGE_SIZE, (end - start) * PAGE_SIZE


def _chunks(bitmap: bytearray) -> Iterator[int]:
    """Yield where chunks of a bitmap begin that are not all zeros."""
    for start, block in blocks_set(bitmap):
        for at in range(0, len(block), _CHUNK_BYTES):
            if block[at : at + _CHUNK_BYTES].strip(b"\0"):
                yield start + at


def _add(bitmap: bytearray, at: int, size: int, bits: int) -> None:
    """Set bits in `size` bytes of a bitmap."""
    end = at + size
    bits |= int.from_bytes(bitmap[at:end], "little")
    bitmap[at:end] = bits.to_bytes(size, "little")


def _bitmap(bits: int, region: "Region") -> bytearray:
    """Return the pages of a region as the kernel has them: in whole words of 64."""
    return bytearray(bits.to_bytes(align_up(region.size // PAGE_SIZE, _WORD) // 8, "little"))


def _pages(region: "Region", start: int, end: int) -> tuple[int, int, int]:
    """Return a range of guest-physical addresses, as far as it is in the region, for `_add`."""
    first = (max(start, region.gpa) - region.gpa) // PAGE_SIZE
    last = -(-(min(end, region.end) - region.gpa) // PAGE_SIZE)
    if first >= last:
        return 0, 0, 0
    at = first // 8
    return at, -(-last // 8) - at, (1 << last - first) - 1 << first - 8 * at
