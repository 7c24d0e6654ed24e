"""Counts and durations of VMs' starts."""

from __future__ import annotations

from vmd.parent.starts import BOUNDS_S, Starts


def test_starts_are_counted_by_how_long_they_took() -> None:
    """Each class includes its upper bound; failed starts are in none."""
    now = 0
    starts = Starts(lambda: now)
    for vm_id, took_ms in enumerate((5, 6, 10, 11_000)):
        starts.begin(vm_id)
        now += took_ms * 1_000_000
        starts.succeed(vm_id)
        starts.end(vm_id)  # later, when the guest has ended
    starts.begin(9)
    starts.end(9)
    starts.end(9)
    totals = starts.totals(4)
    assert (totals.serial, totals.starts, totals.failed_starts) == (4, 4, 1)
    assert totals.start_seconds == 11.021
    assert totals.start_counts == (1, 2, *[0] * (len(BOUNDS_S) - 2), 1)
