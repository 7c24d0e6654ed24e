"""KVM's own counters of vCPUs: exits by reason.

Source: Linux Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD; include/uapi/linux/kvm.h.
"""

import os
import struct
from collections.abc import Iterable

from vmm_kvm.errors import KvmError
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.ioctl import ioctl

_HEADER = struct.Struct("=6I")  # struct kvm_stats_header
_DESCRIPTOR = struct.Struct("=IhHII")  # struct kvm_stats_desc without its name
_COUNTER = struct.Struct("=Q")

_ALL = "exits"
_REASONS = {
    "io_exits": "io",
    "mmio_exits": "mmio",
    "halt_exits": "halt",
    "irq_exits": "interrupt",
    "irq_window_exits": "interrupt-window",
    "nmi_window_exits": "nmi-window",
    "signal_exits": "signal",
    "hypercalls": "hypercall",
}
"""KVM's counters on x86, and this program's names for the reasons."""


class ExitCounts:
    """Counts of some vCPUs' exits; a context manager that owns a descriptor for each of them.

    For one thread; the vCPUs may run.
    """

    def __init__(self, vcpus: Iterable[int]) -> None:
        """Count the exits of vCPUs, given by their descriptors, which stay the caller's.

        None of them may be in the guest: KVM would let this wait until it leaves it.

        Where KVM does not tell (before Linux 5.14), or there are no descriptors left, nothing is
        counted.
        """
        self._fds: list[int] = []
        self._offsets: dict[str, int] = {}
        self._size = 0
        try:
            for vcpu in vcpus:
                self._fds.append(ioctl(vcpu, abi.KVM_GET_STATS_FD))
        except KvmError:
            self.close()
        if self._fds:
            self._find_counters(self._fds[0])

    def close(self) -> None:
        """Close the descriptors; idempotent."""
        while self._fds:
            os.close(self._fds.pop())

    def _find_counters(self, fd: int) -> None:
        header = os.pread(fd, _HEADER.size, 0)
        _, name_size, count, _, descriptors, data = _HEADER.unpack(header)
        size = _DESCRIPTOR.size + name_size
        table = os.pread(fd, size * count, descriptors)
        for at in range(0, len(table) - size + 1, size):
            offset = _DESCRIPTOR.unpack_from(table, at)[3]
            name = table[at + _DESCRIPTOR.size : at + size].partition(b"\0")[0].decode("ascii")
            if name == _ALL or name in _REASONS:
                self._offsets[name] = data + offset
        if self._offsets:
            self._size = max(self._offsets.values()) + _COUNTER.size

    def read(self) -> dict[str, int]:
        """Return how often the guest was left since its start, by reason; empty if unknown.

        `other` counts exits for any other reason. A counter can be ahead of the sum.
        """
        if not self._fds or not self._offsets:
            return {}
        counts = dict.fromkeys(self._offsets, 0)
        for fd in self._fds:
            data = os.pread(fd, self._size, 0)
            for name, offset in self._offsets.items():
                counts[name] += _COUNTER.unpack_from(data, offset)[0]
        told = {reason: counts[name] for name, reason in _REASONS.items() if name in counts}
        told["other"] = max(0, counts.get(_ALL, 0) - sum(told.values()))
        return told
