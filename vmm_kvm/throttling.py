"""Holding a VM's vCPUs for its output's sake, whoever else has paused the VM or lets it go on."""

from contextlib import suppress

from vmm_kvm.errors import KvmError
from vmm_kvm.vm_table import Vmm, check_owner, find_vm


def throttle(vmm: Vmm, vm_id: int, *, hold: bool) -> None:
    """Let `run` wait and bring every vCPU out, without waiting for it; or let them go on.

    Again changes nothing. A VM that is paused as well stands still until both have ended. A guest
    with a kvmclock is told that it was held, so that its watchdogs do not fire. Any thread.

    Raises:
        RefusedError: ENOENT; EPERM.
    """
    check_owner(vmm)
    with vmm.changed:
        vm = find_vm(vmm, vm_id)
        if hold == vm.is_throttled:
            return
        vm.is_throttled = hold
        if hold:
            vm.kick()
            return
        for slot in vm.vcpus:
            if slot.is_out:
                with suppress(KvmError):  # the guest has not set kvmclock up
                    slot.vcpu.kvmclock_ctrl()
        vmm.changed.notify_all()
