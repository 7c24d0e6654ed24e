"""KVM's counts of a guest's exits, compared with the guest's actions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import guests
from vmm_kvm.kvm.exits import IoExit
from vmm_kvm.kvm.stats import ExitCounts

pytestmark = pytest.mark.kvm


def test_exits_are_counted_by_reason() -> None:
    """A guest that writes to a port a hundred times adds a hundred exits for that reason."""
    with guests.guest(guests.out_loop(1000)) as g:
        counts = ExitCounts([g.vcpu.fd])
        before = counts.read()
        for _ in range(100):
            assert isinstance(g.vcpu.run(), IoExit)
        after = counts.read()
        counts.close()
    assert before.keys() == after.keys() >= {"io", "mmio", "halt", "other"}
    # A KVM that emulates the guest gives no reasons; an interrupt of the host is an exit too.
    assert 100 <= sum(after.values()) - sum(before.values()) < 1000
    assert after["io"] - before["io"] in {0, 100}
    assert all(after[reason] >= before[reason] for reason in after)


def test_what_kvm_does_not_tell_is_empty() -> None:
    """For a descriptor that is no vCPU's, and after the end, nothing is counted or left open."""
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with guests.guest(guests.HALT) as g:
        null = os.open(os.devnull, os.O_RDWR)
        assert ExitCounts([g.vcpu.fd, null]).read() == {}
        os.close(null)
        counts = ExitCounts([g.vcpu.fd])
        counts.close()
        assert counts.read() == {}
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before
