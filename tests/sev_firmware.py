"""A double of KVM's and the firmware's part of AMD SEV: `SevSpec.call` goes to one.

It keeps the firmware's state machine, refuses what the firmware refuses, and computes the launch
digest from the plain text that it is given, by 55766 §6. It encrypts nothing. KVM has a VM that is
not encrypted instead; `Firmware.spoils` shows whether the launch was complete, since whatever was
not handed over is garbage afterwards, as it is to a guest that reads it through its key.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from errno import EBADF, EBUSY, EINVAL, EIO, ENOMEM, ENOTTY

from vmm_kvm.errors import KvmError
from vmm_kvm.kvm import sev_abi as abi

TIK = bytes(range(16))
"""The key that measures; only the firmware has it, as long as no owner has agreed on one."""
NONCE = b"sixteen bytes ok"
MAJOR, MINOR, BUILD = 0, 24, 7
REGISTERS = b"registers of a vCPU".ljust(4096, b"\0")
"""A page, in place of the one that KVM makes of a vCPU's registers."""
NODBG, ES = 1 << 0, 1 << 2

_BLOCK = 16
_PAGE = 4096
_MEASUREMENT = 48
_LAUNCH_MEASURE = 0x04  # the context of the measurement
_GARBAGE = 0xA5
_REGISTER = "KVM_MEMORY_ENCRYPT_REG_REGION"


class State(enum.IntEnum):
    """The firmware's states of a guest, and one of KVM's before them."""

    NONE = -1
    UNINIT = 0
    LUPDATE = 1
    LSECRET = 2
    RUNNING = 3


@dataclass
class Guest:
    """What is known of a VM."""

    state: State = State.NONE
    is_es: bool = False
    policy: int = 0
    regions: list[tuple[int, int]] = field(default_factory=list)
    given: list[tuple[int, int]] = field(default_factory=list)
    """Address and bytes of what was to be encrypted, in this process."""
    plain: list[bytes] = field(default_factory=list)
    """The same as contents."""
    has_registers: bool = False


class Firmware:
    """The double; `call` is a `Call`."""

    def __init__(self, sev_fd: int, *, vcpus: int = 1, keys: int = 1, spoils: bool = False) -> None:
        self.sev_fd = sev_fd
        self.vcpus = vcpus
        self.keys = keys
        """VMs that there may be."""
        self.lockable = 1 << 40
        """Bytes that the process may lock."""
        self.spoils = spoils
        self.on_running: Callable[[], None] = lambda: None
        self.on_registers: Callable[[], None] = lambda: None
        self.guests: dict[int, Guest] = {}
        self.log: list[str] = []
        """Every command that was carried out, in order."""
        self.flags = 0

    def call(
        self, fd: int, request: int, argument: int | ctypes.Structure | ctypes.c_uint64 = 0
    ) -> int:
        """Take an ioctl's place."""
        if request == abi.SEV_ISSUE_CMD:
            assert isinstance(argument, abi.sev_issue_cmd)
            self._platform(argument)
        elif request == abi.KVM_MEMORY_ENCRYPT_REG_REGION:
            assert isinstance(argument, abi.kvm_enc_region)
            self._register(self._guest(fd), argument)
        elif request == abi.KVM_MEMORY_ENCRYPT_OP:
            assert isinstance(argument, abi.kvm_sev_cmd)
            self._command(fd, argument)
        else:
            raise AssertionError(f"ioctl {request:#x}")
        return 0

    def only(self) -> Guest:
        """Return the only guest."""
        (guest,) = self.guests.values()
        return guest

    def digest(self) -> bytes:
        """Return the launch digest of the only guest."""
        return hashlib.sha256(b"".join(self.only().plain)).digest()

    def hmac(self, digest: bytes, policy: int) -> bytes:
        """Return the measurement of such a guest."""
        head = bytes((_LAUNCH_MEASURE, MAJOR, MINOR, BUILD)) + policy.to_bytes(4, "little")
        return hmac.new(TIK, head + digest + NONCE, "sha256").digest()

    def _guest(self, fd: int) -> Guest:
        guest = self.guests.get(fd)
        if guest is None:
            raise KvmError("ioctl", ENOTTY)
        return guest

    def _platform(self, command: abi.sev_issue_cmd) -> None:
        assert command.cmd == abi.SEV_PLATFORM_STATUS
        status = abi.sev_user_data_status.from_address(command.data)
        status.api_major, status.api_minor, status.build = MAJOR, MINOR, BUILD
        status.state, status.flags, status.guest_count = 1, self.flags, len(self.guests)

    def _register(self, guest: Guest, region: abi.kvm_enc_region) -> None:
        if region.addr % _PAGE or region.size % _PAGE or not region.size:
            raise KvmError(_REGISTER, EINVAL)
        if sum(size for _, size in guest.regions) + region.size > self.lockable:
            raise KvmError(_REGISTER, ENOMEM)
        guest.regions.append((region.addr, region.size))
        self.log.append("REG_REGION")

    def _command(self, fd: int, command: abi.kvm_sev_cmd) -> None:
        name = abi.COMMANDS[command.id].removeprefix("KVM_SEV_")
        if name in {"INIT", "ES_INIT", "INIT2"}:
            if fd in self.guests:
                raise KvmError("ioctl", EINVAL)
            if len(self.guests) >= self.keys:
                raise KvmError("ioctl", EBUSY)
            self.guests[fd] = Guest(State.UNINIT, is_es=name == "ES_INIT")
        else:
            guest = self._guest(fd)
            if command.sev_fd != self.sev_fd:
                raise KvmError("ioctl", EBADF)
            getattr(self, f"_{name.lower()}")(guest, command)
        self.log.append(name)

    def _refuse(self, command: abi.kvm_sev_cmd, failure: int) -> KvmError:
        command.error = failure
        return KvmError("ioctl", EIO)

    def _in(self, guest: Guest, command: abi.kvm_sev_cmd, *states: State) -> None:
        if guest.state not in states:
            raise self._refuse(command, abi.SEV_RET_INVALID_GUEST_STATE)

    def _launch_start(self, guest: Guest, command: abi.kvm_sev_cmd) -> None:
        self._in(guest, command, State.UNINIT)
        start = abi.kvm_sev_launch_start.from_address(command.data)
        if bool(start.policy & ES) != guest.is_es or start.dh_len or start.session_len:
            raise self._refuse(command, abi.SEV_RET_POLICY_FAILURE)
        guest.policy, guest.state, start.handle = start.policy, State.LUPDATE, 1

    def _launch_update_data(self, guest: Guest, command: abi.kvm_sev_cmd) -> None:
        self._in(guest, command, State.LUPDATE)
        update = abi.kvm_sev_launch_update_data.from_address(command.data)
        start, size = int(update.uaddr), int(update.len)
        if start % _BLOCK:
            raise self._refuse(command, abi.SEV_RET_INVALID_ADDRESS)
        if size % _BLOCK or not size:
            raise self._refuse(command, abi.SEV_RET_INVALID_LEN)
        if not any(at <= start and start + size <= at + room for at, room in guest.regions):
            raise KvmError("ioctl", EINVAL)
        if any(at < start + size and start < at + other for at, other in guest.given):
            raise AssertionError("memory encrypted twice is garbage")
        guest.given.append((start, size))
        guest.plain.append(ctypes.string_at(start, size))

    def _launch_update_vmsa(self, guest: Guest, command: abi.kvm_sev_cmd) -> None:
        if not guest.is_es:
            raise KvmError("ioctl", ENOTTY)
        self._in(guest, command, State.LUPDATE)
        self.on_registers()
        guest.plain += [REGISTERS] * self.vcpus
        guest.has_registers = True

    def _launch_measure(self, guest: Guest, command: abi.kvm_sev_cmd) -> None:
        self._in(guest, command, State.LUPDATE)
        if guest.is_es and not guest.has_registers:
            raise self._refuse(command, abi.SEV_RET_INVALID_GUEST_STATE)
        measure = abi.kvm_sev_launch_measure.from_address(command.data)
        room, measure.len = int(measure.len), _MEASUREMENT
        if room < _MEASUREMENT:
            self.log.append("LAUNCH_MEASURE of no length")
            raise self._refuse(command, abi.SEV_RET_INVALID_LEN)
        digest = hashlib.sha256(b"".join(guest.plain)).digest()
        ctypes.memmove(measure.uaddr, self.hmac(digest, guest.policy) + NONCE, _MEASUREMENT)
        guest.state = State.LSECRET

    def _launch_finish(self, guest: Guest, command: abi.kvm_sev_cmd) -> None:
        self._in(guest, command, State.LSECRET)
        guest.state = State.RUNNING
        if self.spoils:
            self._spoil(guest)
        self.on_running()

    def _guest_status(self, guest: Guest, command: abi.kvm_sev_cmd) -> None:
        status = abi.kvm_sev_guest_status.from_address(command.data)
        status.handle, status.policy, status.state = 1, guest.policy, guest.state

    @staticmethod
    def _spoil(guest: Guest) -> None:
        for start, size in guest.regions:
            at = start
            for given, length in sorted(guest.given):
                if start <= given < start + size:
                    ctypes.memset(at, _GARBAGE, given - at)
                    at = given + length
            ctypes.memset(at, _GARBAGE, start + size - at)
