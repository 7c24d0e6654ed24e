"""/dev/kvm itself: its version, its capabilities, and new VMs."""

import ctypes
import grp
import os
import stat
from contextlib import suppress
from errno import (
    E2BIG,
    EACCES,
    EBUSY,
    EEXIST,
    EINVAL,
    ENODEV,
    ENOENT,
    ENOTSUP,
    ENOTTY,
    ENXIO,
    EPERM,
)
from typing import Self

from vmm_kvm.errors import KvmError
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.cpuid import ECX1_TSC_DEADLINE, CpuidEntry
from vmm_kvm.kvm.ioctl import ioctl, retried_ioctl
from vmm_kvm.kvm.vm import Vm

_FIRST_CPUID_ENTRIES = 128
_MOST_CPUID_ENTRIES = 4096
_MOST_MSRS = 1 << 16
_NO_DEVICE = "load the module kvm_intel or kvm_amd, and enable virtualisation in the firmware"
_NOT_KVM = "not a KVM device: name /dev/kvm, or a copy of that device node"


class Kvm:
    """An open /dev/kvm; a context manager that owns its file descriptor.

    Every method may be called from any thread.
    """

    __slots__ = ("api_version", "fd", "known_cpuid", "ready", "vcpu_mmap_size")

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Open `path`.

        Raises:
            KvmError: it is missing, forbidden, no KVM device, busy or too old; the hint says what
                to do about it.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as err:
            errno = err.errno or ENODEV
            raise KvmError(path, errno, open_hint(path, errno)) from err
        self.fd = fd
        self.ready: Vm | None = None
        """The VM that `make_ready` has made, until `create_vm` returns it."""
        self.known_cpuid: tuple[CpuidEntry, ...] = ()
        self.api_version, self.vcpu_mmap_size = _probe(fd, path)

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Use an open /dev/kvm; takes ownership of `fd`, and closes it when this fails.

        Raises:
            KvmError: it is no KVM device, or too old.
        """
        kvm = cls.__new__(cls)
        kvm.fd = fd
        kvm.known_cpuid = ()
        kvm.ready = None
        kvm.api_version, kvm.vcpu_mmap_size = _probe(fd, f"fd {fd}")
        return kvm

    def close(self) -> None:
        """Close the file descriptor; idempotent. VMs made from it live on."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        ready, self.ready = self.ready, None
        if ready:
            ready.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def check_extension(self, capability: int) -> int:
        """Return 0 if KVM lacks `capability`, else a positive number whose meaning varies.

        Raises:
            KvmError: the file descriptor is closed.

        Source: KVM API §4.4.
        """
        return ioctl(self.fd, abi.KVM_CHECK_EXTENSION, capability)

    @property
    def max_vcpus(self) -> int:
        """How many vCPUs a VM may have.

        Source: KVM API §4.7.
        """
        return self.check_extension(abi.KVM_CAP_MAX_VCPUS)

    @property
    def can_coalesce_ports(self) -> bool:
        """Whether `Vm.register_coalesced` takes ports.

        Source: KVM API §4.116.
        """
        return self.check_extension(abi.KVM_CAP_COALESCED_PIO) > 0

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """Return every CPUID leaf that KVM can give to a guest on this host; KVM is asked once.

        The TSC-deadline bit is added where KVM has that timer: the kernel leaves it out because
        it works only with the kernel's own local APICs, which this project always uses.

        Raises:
            KvmError: the kernel refused.

        Source: KVM API §4.46.
        """
        self.known_cpuid = self.known_cpuid or self._ask_cpuid()
        return self.known_cpuid

    def _ask_cpuid(self) -> tuple[CpuidEntry, ...]:
        count = _FIRST_CPUID_ENTRIES
        while True:
            table = abi.with_entries(abi.kvm_cpuid2, abi.kvm_cpuid_entry2, count)(nent=count)
            try:
                ioctl(self.fd, abi.KVM_GET_SUPPORTED_CPUID, table)
            except KvmError as err:
                if err.errno != E2BIG or count >= _MOST_CPUID_ENTRIES:
                    raise
                count *= 2
                continue
            break
        deadline = ECX1_TSC_DEADLINE if self.check_extension(abi.KVM_CAP_TSC_DEADLINE_TIMER) else 0
        return tuple(
            CpuidEntry(
                e.function,
                e.index,
                e.flags,
                e.eax,
                e.ebx,
                e.ecx | (deadline if e.function == 1 else 0),
                e.edx,
            )
            for e in table.entries[: table.nent]
        )

    def msr_indices(self) -> list[int]:
        """Return the MSRs that hold a guest's state, for `Vcpu.get_msrs` and `set_msrs`.

        Raises:
            KvmError: the kernel refused.

        Source: KVM API §4.3.
        """
        header = abi.kvm_msr_list()
        try:
            ioctl(self.fd, abi.KVM_GET_MSR_INDEX_LIST, header)
        except KvmError as err:
            if err.errno != E2BIG or header.nmsrs > _MOST_MSRS:
                raise
        count = int(header.nmsrs)
        table = abi.with_entries(abi.kvm_msr_list, ctypes.c_uint32, count)(nmsrs=count)
        ioctl(self.fd, abi.KVM_GET_MSR_INDEX_LIST, table)
        return list(table.indices[: table.nmsrs])

    def create_vm(self, vm_type: int = 0) -> Vm:
        """Make a VM without memory, interrupt controllers or vCPUs.

        Only the calling process can use it. `vm_type` is a KVM_X86_*_VM that KVM offers.

        Raises:
            KvmError: the kernel refused; the hint says why when another hypervisor is in the way.

        Source: KVM API §4.2.
        """
        if self.ready and vm_type == 0:
            ready, self.ready = self.ready, None
            return ready
        return self._make_vm(vm_type)

    def make_ready(self) -> None:
        """Make this process's next VM, of type 0, now: `create_vm` will not wait for the kernel.

        Raises:
            KvmError: as `create_vm`.
        """
        self.ready = self._make_vm(0)

    def _make_vm(self, vm_type: int) -> Vm:
        try:
            fd = retried_ioctl(self.fd, abi.KVM_CREATE_VM, vm_type)
        except KvmError as err:
            raise KvmError(err.operation, err.errno or EINVAL, create_hint(err.errno)) from err
        return Vm(self, fd)


def _probe(fd: int, name: str) -> tuple[int, int]:
    """Return the API version and the bytes to map per vCPU; closes `fd` on failure."""
    try:
        try:
            version = ioctl(fd, abi.KVM_GET_API_VERSION)
        except KvmError as err:
            hint = _NOT_KVM if err.errno in {ENOTTY, EINVAL} else open_hint(name, err.errno)
            raise KvmError(name, err.errno or ENOTTY, hint) from err
        check_api_version(name, version)
        return version, ioctl(fd, abi.KVM_GET_VCPU_MMAP_SIZE)
    except BaseException:
        with suppress(OSError):
            os.close(fd)
        raise


def check_api_version(name: str, version: int) -> None:
    """Refuse any version but the only one ever released.

    Raises:
        KvmError: `version` is another; `name` begins its text.

    Source: KVM API §4.1.
    """
    if version != abi.KVM_API_VERSION:
        hint = f"KVM API version {version}, not {abi.KVM_API_VERSION}: run Linux 2.6.22 or newer"
        raise KvmError(name, ENOTSUP, hint)


def create_hint(errno: int | None) -> str:
    """Return what to do when KVM_CREATE_VM fails with `errno`."""
    match errno:
        case _ if errno in {EBUSY, EEXIST}:
            return "another hypervisor uses the processor's virtualisation: stop it first"
        case _ if errno in {ENODEV, ENOTSUP}:
            return _NO_DEVICE
    return ""


def open_hint(path: str, errno: int | None) -> str:
    """Return what to do when opening `path` fails with `errno`."""
    match errno:
        case _ if errno in {ENOENT, ENODEV, ENXIO}:
            return _NO_DEVICE
        case _ if errno in {EACCES, EPERM}:
            return _permission_hint(path)
        case _ if errno == EBUSY:
            return "another hypervisor uses the device: stop it first"
    return ""


def _permission_hint(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return "run as root"
    wanted = stat.S_IRGRP | stat.S_IWGRP
    if status.st_mode & wanted == wanted and status.st_gid != 0:
        try:
            group = grp.getgrgid(status.st_gid).gr_name
        except KeyError:
            group = str(status.st_gid)
        return f"add your user to group {group}: sudo usermod -aG {group} $USER, then log in again"
    return f"run as root, or: sudo chgrp kvm {path} && sudo chmod 660 {path}"
