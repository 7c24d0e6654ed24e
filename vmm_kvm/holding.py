"""Holding a VM's vCPUs for its output's or a debugger's sake, besides any pause of the VM."""

from collections.abc import Collection
from contextlib import suppress

from vmm_kvm.errors import KvmError
from vmm_kvm.vm_table import VmEntry, Vmm, check_owner, find_vm, wait_until_out


def throttle(vmm: Vmm, vm_id: int, *, hold: bool) -> None:
    """Make `run` wait and interrupt every vCPU, without waiting for it; or let them run.

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
        _let_go(vmm, vm)


def hold_vcpus(vmm: Vmm, vm_id: int, held: Collection[int], *, wait: bool = True) -> None:
    """Keep the vCPUs of these indices out of the guest, and no others, for a debugger.

    Returns when none is in the guest if all are held; without `wait` at once. Any thread; with
    `wait` not one that is in `run` of this VM.

    Raises:
        RefusedError: ENOENT, also when the VM is terminated meanwhile; EPERM.
    """
    check_owner(vmm)
    with vmm.changed:
        vm = find_vm(vmm, vm_id)
        vm.held_vcpus = frozenset(held)
        if len(vm.held_vcpus) < len(vm.vcpus):
            _let_go(vmm, vm)
        elif wait:
            wait_until_out(vmm, vm)
        else:
            vm.kick()


def _let_go(vmm: Vmm, vm: VmEntry) -> None:
    for slot in vm.vcpus:
        if slot.is_out:
            with suppress(KvmError):  # the guest has not set kvmclock up
                slot.vcpu.kvmclock_ctrl()
    vmm.changed.notify_all()
