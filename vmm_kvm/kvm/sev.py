"""AMD SEV and SEV-ES: a VM whose memory, with ES also its registers, the host cannot read.

The processor's firmware has a key for each VM. KVM passes our commands on to it, in this order: the
VM's beginning, LAUNCH_START, LAUNCH_UPDATE_DATA for all that the guest finds in memory, with ES
LAUNCH_UPDATE_VMSA, LAUNCH_MEASURE, LAUNCH_FINISH. Any other order it refuses.

Every command goes through one function, `Call`; tests put a firmware of their own there. Nothing of
this has run on a processor with SEV.

Source: AMD 55766, Secure Encrypted Virtualization API 0.24, §6; KVM's amd-memory-encryption.rst.
"""

import ctypes
import enum
import os
import stat
from collections.abc import Callable
from ctypes import Structure, c_uint64
from errno import EBUSY, EINVAL, EIO, ENODEV, ENOMEM, ENOTTY
from typing import NamedTuple

from vmm_kvm.bits import align_down, align_up
from vmm_kvm.errors import KvmError
from vmm_kvm.kvm import sev_abi as abi
from vmm_kvm.kvm.ioctl import ioctl
from vmm_kvm.kvm.system import Kvm

DEVICE = "/dev/sev"
BLOCK = 16
"""Bytes: what the firmware encrypts begins and ends at a multiple of this."""
Call = Callable[[int, int, "Structure | c_uint64"], int]
"""`ioctl.ioctl`, or a double."""


class SevSpec(NamedTuple):
    """AMD SEV for a VM."""

    fd: int
    """/dev/sev, open for reading; stays the caller's."""
    is_es: bool = False
    """Whether registers are encrypted too: SEV-ES."""
    call: Call = ioctl
    """Every command of the launch goes through it."""


class Policy(enum.IntFlag):
    """What the firmware never does with a guest, not even at the host's word (55766 §3)."""

    NODBG = 1 << 0
    """Let the host read or write its memory."""
    NOKS = 1 << 1
    """Share its key with another guest."""
    ES = 1 << 2
    """Run it without SEV-ES."""
    NOSEND = 1 << 3
    """Send it to another host."""
    DOMAIN = 1 << 4
    """Send it out of its owner's hosts."""
    SEV = 1 << 5
    """Send it to a host without SEV."""


POLICY = Policy.NODBG | Policy.NOKS | Policy.NOSEND | Policy.DOMAIN | Policy.SEV
"""OpenBSD's; with SEV-ES, `Policy.ES` besides."""


class GuestState(enum.IntEnum):
    """The firmware's states of a guest (55766 §2.3)."""

    UNINIT = 0
    LAUNCH_UPDATE = 1
    LAUNCH_SECRET = 2
    RUNNING = 3


class Measurement(NamedTuple):
    """The firmware's word for what it has encrypted."""

    hmac: bytes
    """32 bytes: HMAC-SHA-256 of version, policy, launch digest and nonce, by a key of the
    firmware's that nobody knows as long as no owner has agreed on one with it."""
    nonce: bytes
    """16 bytes."""


_MEASUREMENT_SIZE = 48
_HMAC_SIZE = 32


class Platform(NamedTuple):
    """The firmware of this host's processors."""

    major: int
    """Version of its interface."""
    minor: int
    build: int
    has_es: bool
    """Whether it was set up for SEV-ES."""


def platform(fd: int, call: Call = ioctl) -> Platform:
    """Return what the firmware behind an open /dev/sev is; reading is enough for that.

    Raises:
        KvmError: it is no such device, or the firmware does not answer.
    """
    if not stat.S_ISCHR(os.fstat(fd).st_mode):
        raise KvmError(DEVICE, ENODEV)
    status = abi.sev_user_data_status()
    command = abi.sev_issue_cmd(cmd=abi.SEV_PLATFORM_STATUS, data=ctypes.addressof(status))
    try:
        call(fd, abi.SEV_ISSUE_CMD, command)
    except KvmError as err:
        raise KvmError(DEVICE, err.errno or EIO, _reason(int(command.error))) from err
    has_es = bool(status.flags & abi.SEV_STATUS_FLAGS_CONFIG_ES)
    return Platform(status.api_major, status.api_minor, status.build, has_es)


class Launch:
    """One VM's launch; `vmm_kvm.kvm.vm` has the VM, `vmm_kvm.machine.encryption` its memory."""

    def __init__(self, kvm: Kvm, spec: SevSpec, c_bit: int) -> None:
        """Plan a VM of `kvm`; `c_bit` says in an address that the memory there is encrypted."""
        self.c_bit = c_bit
        self.is_es = spec.is_es
        self.policy = POLICY | (Policy.ES if spec.is_es else 0)
        self._fd = spec.fd
        self._call = spec.call
        self._vm_fd = -1
        wanted = abi.KVM_X86_SEV_ES_VM if spec.is_es else abi.KVM_X86_SEV_VM
        has_types = kvm.check_extension(abi.KVM_CAP_VM_TYPES) >> wanted & 1
        self.vm_type = wanted if has_types else abi.KVM_X86_DEFAULT_VM
        """The argument of KVM_CREATE_VM."""

    def begin(self, vm_fd: int) -> None:
        """Make a new VM, whose vCPUs do not exist yet, one with a key of its own.

        Raises:
            KvmError: KVM or the firmware refused; there may be as many such VMs already as the
                processor has keys for.
        """
        self._vm_fd = vm_fd
        if self.vm_type != abi.KVM_X86_DEFAULT_VM:
            self._command(abi.KVM_SEV_INIT2, abi.kvm_sev_init())
        else:
            self._command(abi.KVM_SEV_ES_INIT if self.is_es else abi.KVM_SEV_INIT)

    def start(self) -> None:
        """Have the firmware make the key, and prepare for what it is to encrypt.

        Raises:
            KvmError: it refused.
        """
        self._command(abi.KVM_SEV_LAUNCH_START, abi.kvm_sev_launch_start(policy=int(self.policy)))
        self._expect(GuestState.LAUNCH_UPDATE)

    def register(self, hva: int, size: int) -> None:
        """Keep memory where it is: its place is part of how it is encrypted.

        Both are multiples of 4096. The kernel counts it as locked memory.

        Raises:
            KvmError: the process may not lock so much.
        """
        region = abi.kvm_enc_region(addr=hva, size=size)
        try:
            self._call(self._vm_fd, abi.KVM_MEMORY_ENCRYPT_REG_REGION, region)
        except KvmError as err:
            hint = "vmd's limit of locked memory, see vmd(8)" if err.errno == ENOMEM else ""
            raise KvmError(err.operation, err.errno or EIO, hint) from err

    def encrypt(self, hva: int, size: int) -> None:
        """Have memory encrypted and measured where it lies, in whole blocks around it.

        Raises:
            KvmError: the firmware refused.
        """
        start, end = align_down(hva, BLOCK), align_up(hva + size, BLOCK)
        update = abi.kvm_sev_launch_update_data(uaddr=start, len=end - start)
        self._command(abi.KVM_SEV_LAUNCH_UPDATE_DATA, update)

    def finish(self) -> Measurement:
        """Have the vCPUs' registers encrypted, if they are to be, and let the guest run.

        Raises:
            KvmError: the firmware refused.
        """
        if self.is_es:
            self._command(abi.KVM_SEV_LAUNCH_UPDATE_VMSA)
        measurement = self._measure()
        self._command(abi.KVM_SEV_LAUNCH_FINISH)
        self._expect(GuestState.RUNNING)
        return measurement

    def _measure(self) -> Measurement:
        asked = abi.kvm_sev_launch_measure()
        try:  # with no room, it tells how much it needs
            self._command(abi.KVM_SEV_LAUNCH_MEASURE, asked)
        except KvmError:
            if not asked.len:
                raise
        if asked.len != _MEASUREMENT_SIZE:
            raise KvmError("KVM_SEV_LAUNCH_MEASURE", EIO, f"a measurement of {asked.len} bytes")
        room = (ctypes.c_char * _MEASUREMENT_SIZE)()
        asked.uaddr = ctypes.addressof(room)
        self._command(abi.KVM_SEV_LAUNCH_MEASURE, asked)
        return Measurement(room.raw[:_HMAC_SIZE], room.raw[_HMAC_SIZE:])

    def _expect(self, state: GuestState) -> None:
        status = abi.kvm_sev_guest_status()
        self._command(abi.KVM_SEV_GUEST_STATUS, status)
        if status.state != state:
            hint = f"invalid guest state: {status.state:#x}"
            raise KvmError("KVM_SEV_GUEST_STATUS", EIO, hint)

    def _command(self, number: int, data: Structure | None = None) -> None:
        command = abi.kvm_sev_cmd(id=number, sev_fd=self._fd)
        if data is not None:
            command.data = ctypes.addressof(data)
        try:
            self._call(self._vm_fd, abi.KVM_MEMORY_ENCRYPT_OP, command)
        except KvmError as err:
            raise KvmError(
                abi.COMMANDS[number], err.errno or EIO, _hint(number, err.errno, int(command.error))
            ) from err


def _hint(number: int, errno: int | None, failure: int) -> str:
    if failure:
        return _reason(failure)
    if number not in {abi.KVM_SEV_INIT, abi.KVM_SEV_ES_INIT, abi.KVM_SEV_INIT2}:
        return ""
    if errno == EBUSY:
        return "all keys of the processor are in use"
    if errno in {ENOTTY, EINVAL}:
        return "KVM has no SEV here: load kvm_amd with sev=1 and, for SEV-ES, sev_es=1"
    return ""


def _reason(failure: int) -> str:
    if not failure:
        return ""
    return f"firmware: {abi.FAILURES.get(failure, 'error')}, {failure:#x}"
