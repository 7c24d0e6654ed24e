"""Exits that end a machine, where KVM does not tell the registers, as with SEV-ES."""

from __future__ import annotations

import pytest

from tests import guests
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.exits import Shutdown, SystemEvent
from vmm_kvm.machine.bad_exits import outcome_of
from vmm_kvm.machine.spec import Crash, TripleFault

pytestmark = pytest.mark.kvm


def test_registers_that_cannot_be_read() -> None:
    """The outcome is told without them; a vCPU that is closed refuses them too."""
    with guests.guest(guests.HALT) as made:
        assert " rip=0x1000 " in str(outcome_of("web", made.vcpu, Shutdown()))
        made.vcpu.close()
        text = "web: triple fault: vcpu0, whose registers cannot be read"
        assert outcome_of("web", made.vcpu, Shutdown()) == TripleFault(text)


def test_a_guest_that_ends_itself() -> None:
    """A guest that finds SEV-ES wanting says so by an exit of its own."""
    with guests.guest(guests.HALT) as made:
        event = SystemEvent(type=abi.KVM_SYSTEM_EVENT_SEV_TERM)
        text = "web: the guest cannot run with SEV-ES, and has ended itself"
        assert outcome_of("web", made.vcpu, event) == Crash(text)
