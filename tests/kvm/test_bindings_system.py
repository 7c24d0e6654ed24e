"""/dev/kvm itself: versions, capabilities, CPUID, MSRs."""

from __future__ import annotations

import os

import pytest

from vmm_kvm.errors import KvmError
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.cpuid import ECX1_TSC_DEADLINE
from vmm_kvm.kvm.system import Kvm

pytestmark = pytest.mark.kvm

MSR_IA32_TSC = 0x10
PAGE = 4096


def test_version_and_mapping() -> None:
    """The version is 12, and a vCPU's mapping holds kvm_run and the port data page."""
    with Kvm() as kvm:
        assert kvm.api_version == abi.KVM_API_VERSION
        assert kvm.vcpu_mmap_size >= 2 * PAGE
        assert kvm.vcpu_mmap_size % PAGE == 0


def test_from_fd() -> None:
    """An open descriptor serves as well, and closing the object closes it."""
    fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    with Kvm.from_fd(fd) as kvm:
        assert kvm.fd == fd
        assert kvm.check_extension(abi.KVM_CAP_USER_MEMORY) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_close_is_idempotent() -> None:
    """Closing twice is allowed; later use raises an error with the request's name."""
    kvm = Kvm()
    kvm.close()
    kvm.close()
    with pytest.raises(KvmError) as caught:
        kvm.check_extension(abi.KVM_CAP_IRQCHIP)
    assert str(caught.value) == "KVM_CHECK_EXTENSION: Bad file descriptor"


def test_capabilities() -> None:
    """Capabilities that every KVM has are there; an unknown number is not."""
    with Kvm() as kvm:
        for capability in (abi.KVM_CAP_USER_MEMORY, abi.KVM_CAP_IRQCHIP, abi.KVM_CAP_EXT_CPUID):
            assert kvm.check_extension(capability) > 0
        assert kvm.check_extension(abi.KVM_CAP_MAX_VCPUS) >= 1
        assert kvm.check_extension(0xFFFF) == 0


def test_supported_cpuid() -> None:
    """The table has each basic leaf once, and the TSC-deadline bit as the capability says."""
    with Kvm() as kvm:
        entries = kvm.supported_cpuid()
        features = [e for e in entries if e.function == 1]
        assert len([e for e in entries if e.function == 0]) == 1
        assert len(features) == 1
        has_timer = kvm.check_extension(abi.KVM_CAP_TSC_DEADLINE_TIMER) > 0
        assert bool(features[0].ecx & ECX1_TSC_DEADLINE) == has_timer


def test_msr_indices() -> None:
    """The list of state-holding MSRs has the time-stamp counter, and no MSR twice."""
    with Kvm() as kvm:
        indices = kvm.msr_indices()
    assert MSR_IA32_TSC in indices
    assert len(set(indices)) == len(indices)


def test_vms_outlive_the_system() -> None:
    """A VM works on after /dev/kvm is closed."""
    with Kvm() as kvm:
        vm = kvm.create_vm()
    with vm, vm.create_vcpu(0) as vcpu:
        assert vcpu.get_regs().rip == 0xFFF0


def test_a_vm_is_made_ahead() -> None:
    """It is the next one, a whole one, and only that; one that nobody takes is closed."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone
    with Kvm() as kvm:
        kvm.make_ready()
        made = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone
        with kvm.create_vm() as vm:
            assert len(os.listdir("/proc/self/fd")) == made  # noqa: PTH208 - names alone
            with kvm.create_vm() as other, vm.create_vcpu(0) as vcpu:
                assert other.fd != vm.fd
                assert vcpu.get_regs().rip == 0xFFF0
        kvm.make_ready()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - names alone
