"""A VM is held because its output is not read, or by a pause, or both."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import partial

import pytest

from tests import guests
from tests.kvm.primitive_guests import Ram, Runner, create, mapped
from vmm_kvm import primitives
from vmm_kvm.errors import Refusal, RefusedError
from vmm_kvm.holding import throttle
from vmm_kvm.kvm.exits import Hlt
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import KICK_SIGNAL, install_kick_signal
from vmm_kvm.primitives import Vmm
from vmm_kvm.vm_params import Controllers

pytestmark = pytest.mark.kvm


@pytest.fixture
def vmm() -> Iterator[Vmm]:
    """An empty table, and the handler that kicks need."""
    before = signal.getsignal(KICK_SIGNAL)
    install_kick_signal()
    with Kvm() as kvm, Vmm(kvm) as made:
        yield made
    signal.signal(KICK_SIGNAL, before)
    mapped.clear()


def test_a_vm_stands_still_for_two_reasons(vmm: Vmm) -> None:
    """Throttle and pause are lifted one by one: the VM runs when neither holds it."""
    vm_id, ram = create(vmm, guests.SPIN)
    runner = Runner(vmm, vm_id)
    primitives.pause(vmm, vm_id)
    ram.put(guests.CODE, guests.HALT)
    for begin, end in (
        (partial(throttle, vmm, vm_id, hold=True), partial(throttle, vmm, vm_id, hold=False)),
        (partial(primitives.pause, vmm, vm_id), partial(primitives.unpause, vmm, vm_id)),
    ):
        begin()
        begin()
        primitives.pause(vmm, vm_id)
        throttle(vmm, vm_id, hold=True)
        end()
        runner.wait_until(lambda: vmm.vms[vm_id].vcpus[0].is_waiting)
        runner.thread.join(0.2)
        assert runner.thread.is_alive()
    throttle(vmm, vm_id, hold=False)
    assert isinstance(runner.join().exit, Hlt)


def test_a_throttled_vm_is_not_paused(vmm: Vmm) -> None:
    """The state of a throttled VM cannot be saved: a device may still work."""
    params = Ram().params().but(controllers=Controllers.KERNEL)
    vm_id = primitives.create(vmm, params)
    throttle(vmm, vm_id, hold=True)
    with pytest.raises(RefusedError) as caught:
        primitives.save_state(vmm, vm_id)
    assert caught.value.refusal is Refusal.EBUSY
    throttle(vmm, vm_id, hold=False)
    primitives.pause(vmm, vm_id)
    primitives.save_state(vmm, vm_id)
