"""How many VMs the daemon has started, and how long each took until its guest ran."""

from bisect import bisect_left
from collections.abc import Callable

from vmd.wire.messages import Totals
from vmm_kvm.clock import NANOSECONDS

BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the classes of durations; there is one above the last."""


class Starts:
    """Starts since the daemon began. For one thread."""

    def __init__(self, monotonic_ns: Callable[[], int]) -> None:
        """Begin with none."""
        self._monotonic_ns = monotonic_ns
        self._began: dict[int, int] = {}
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_ns = 0
        self._failed = 0

    def begin(self, vm_id: int) -> None:
        """Account for a VM that is being started."""
        self._began[vm_id] = self._monotonic_ns()

    def succeed(self, vm_id: int) -> None:
        """Account for a VM whose guest runs now."""
        began = self._began.pop(vm_id, None)
        if began is not None:
            took = self._monotonic_ns() - began
            self._sum_ns += took
            self._counts[bisect_left(BOUNDS_S, took / NANOSECONDS)] += 1

    def end(self, vm_id: int) -> None:
        """Account for the end of a VM: if its guest has not run, the start has failed."""
        if self._began.pop(vm_id, None) is not None:
            self._failed += 1

    def totals(self, serial: int) -> Totals:
        """Return the answer to a client."""
        return Totals(
            serial=serial,
            starts=sum(self._counts),
            failed_starts=self._failed,
            start_seconds=self._sum_ns / NANOSECONDS,
            start_bounds=BOUNDS_S,
            start_counts=tuple(self._counts),
        )
