"""What KVM counts of a guest's exits, beside what the guest has done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import guests
from vmm_kvm.kvm.exits import IoExit
from vmm_kvm.kvm.stats import ExitCounts

pytestmark = pytest.mark.kvm


def test_exits_are_counted_by_reason() -> None:
    """A guest that writes to a port a hundred times was left for that a hundred times more."""
    with guests.guest(guests.out_loop(1000)) as g:
        counts = ExitCounts([g.vcpu.fd])
        before = counts.read()
        for _ in range(100):
            assert isinstance(g.vcpu.run(), IoExit)
        after = counts.read()
        counts.close()
    assert before.keys() == after.keys() >= {"io", "mmio", "halt", "other"}
    # Where KVM emulates the guest it gives no reasons; an interrupt of the host's is an exit too.
    assert 100 <= sum(after.values()) - sum(before.values()) < 1000
    assert after["io"] - before["io"] in {0, 100}
    assert all(after[reason] >= before[reason] for reason in after)


def test_what_kvm_does_not_tell_is_empty() -> None:
    """A descriptor that is no vCPU's, and the end: nothing is counted, nothing is left open."""
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with guests.guest(guests.HALT) as g:
        null = os.open(os.devnull, os.O_RDWR)
        assert ExitCounts([g.vcpu.fd, null]).read() == {}
        os.close(null)
        counts = ExitCounts([g.vcpu.fd])
        counts.close()
        assert counts.read() == {}
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before
