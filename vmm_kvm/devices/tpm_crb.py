"""TPM 2.0, as a guest sees it: commands and responses through one buffer (CRB), locality 0.

The driver writes a command into the buffer, starts it, and waits until the register says that it
is done; the response is in the buffer then. What a TPM does with a command is another's: see
`Executor`. A command can take minutes, so each has a thread.

Locks: `lock`, taken by the bus and by every public method; it is not held while a command runs.

Source: TCG PC Client Platform TPM Profile 1.05 §6.5.3; Linux drivers/char/tpm/tpm_crb.c
"""

import threading
from enum import IntEnum, IntFlag
from typing import Protocol

from vmm_kvm.bits import all_ones
from vmm_kvm.errors import VmmError
from vmm_kvm.log import Log

log = Log(__name__)

BUFFER = 0x80
"""Offset of the buffer."""
BUFFER_SIZE = 0x1000 - BUFFER
HEADER_SIZE = 10
"""Bytes of a command's header, and of a response's: tag, size (32 bits, big-endian), code."""

_CANCEL_S = 10.0
_INTERFACE = (
    1  # type: CRB
    | 1 << 4  # version
    | 3 << 11  # transfers of up to 64 bytes
    | 1 << 14  # CRB can be
    | 1 << 17  # and is selected
)
_VENDOR = 0x1AF4  # of the identifier; a driver does nothing with it


class Register(IntEnum):
    """Offsets in memory."""

    LOC_STATE = 0x00
    LOC_CTRL = 0x08
    LOC_STS = 0x0C
    INTF_ID = 0x30
    CTRL_REQ = 0x40
    CTRL_STS = 0x44
    CTRL_CANCEL = 0x48
    CTRL_START = 0x4C
    CTRL_CMD_SIZE = 0x58
    CTRL_CMD_LADDR = 0x5C
    CTRL_RSP_SIZE = 0x64
    CTRL_RSP_ADDR = 0x68


class LocState(IntFlag):
    """Of locality 0."""

    NOT_ESTABLISHED = 1 << 0
    ASSIGNED = 1 << 1
    VALID = 1 << 7


class LocCtrl(IntFlag):
    """What a driver asks for."""

    REQUEST = 1 << 0
    RELINQUISH = 1 << 1


class Request(IntFlag):
    """What a driver asks for."""

    READY = 1 << 0
    IDLE = 1 << 1


class Status(IntFlag):
    """Of the TPM."""

    FAILED = 1 << 0
    IDLE = 1 << 1


class Executor(Protocol):
    """A TPM: it knows commands, and keeps what lasts."""

    def power_on(self) -> None:
        """Begin as after a reset of the machine; what is kept in it stays.

        Raises:
            VmmError: it does not answer, or refuses.
        """

    def execute(self, command: bytes) -> bytes:
        """Return the response to a command; takes minutes at most.

        Raises:
            VmmError: it does not answer in time, or not as a TPM does.
        """

    def cancel(self) -> None:
        """Have a command that runs end soon, if it can be cancelled; any thread."""

    def abandon(self) -> None:
        """Have a command that runs fail at once, and every later one; any thread."""


class TpmCrb:
    """The interface of a TPM; a BusDevice at `base`, of 4 KiB for each locality."""

    def __init__(self, base: int, executor: Executor) -> None:
        """Make one for a machine that is being switched on, with its TPM.

        Raises:
            VmmError: the TPM does not work.
        """
        executor.power_on()
        self.lock = threading.Lock()
        self._executor = executor
        self._address = base + BUFFER
        self._buffer = bytearray(BUFFER_SIZE)
        self._is_assigned = False
        self._status = Status.IDLE
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._failure = ""

    def close(self) -> None:
        """Forget a command that runs: its response goes nowhere. Idempotent."""
        with self.lock:
            self._is_closed = True
            thread, self._thread = self._thread, None
        if thread:
            self._executor.cancel()
            thread.join(_CANCEL_S)
            if thread.is_alive():
                self._executor.abandon()
                thread.join()

    # The guest's side; the bus holds the lock

    def read(self, offset: int, size: int) -> int:
        """Read registers, or the buffer."""
        end = offset + size
        if offset >= BUFFER and end <= BUFFER + BUFFER_SIZE:
            data = self._buffer[offset - BUFFER : end - BUFFER]
            return int.from_bytes(data, "little")
        if end > BUFFER:
            return all_ones(size)
        return int.from_bytes(self._registers()[offset:end], "little")

    def _registers(self) -> bytes:
        image = bytearray(BUFFER)

        def put(at: int, width: int, value: int) -> None:
            image[at : at + width] = value.to_bytes(width, "little")

        state = LocState.VALID | LocState.NOT_ESTABLISHED
        put(Register.LOC_STATE, 4, state | LocState.ASSIGNED * self._is_assigned)
        put(Register.LOC_STS, 4, int(self._is_assigned))
        put(Register.INTF_ID, 8, _INTERFACE | _VENDOR << 32)
        put(Register.CTRL_STS, 4, self._status)
        put(Register.CTRL_START, 4, int(self._thread is not None))
        put(Register.CTRL_CMD_SIZE, 4, BUFFER_SIZE)
        put(Register.CTRL_CMD_LADDR, 4, self._address)
        put(Register.CTRL_RSP_SIZE, 4, BUFFER_SIZE)
        put(Register.CTRL_RSP_ADDR, 8, self._address)
        return bytes(image)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the buffer, while no command runs, or a register."""
        end = offset + size
        value &= all_ones(size)
        if offset >= BUFFER and end <= BUFFER + BUFFER_SIZE:
            if self._thread is None:
                self._buffer[offset - BUFFER : end - BUFFER] = value.to_bytes(size, "little")
            return
        match offset:
            case Register.LOC_CTRL if value & LocCtrl.RELINQUISH:
                self._is_assigned = False
            case Register.LOC_CTRL if value & LocCtrl.REQUEST:
                self._is_assigned = True
            case Register.CTRL_REQ if value & Request.READY:
                self._status &= ~Status.IDLE
            case Register.CTRL_REQ if value & Request.IDLE:
                self._status |= Status.IDLE
            case Register.CTRL_CANCEL if value & 1 and self._thread:
                self._executor.cancel()
            case Register.CTRL_START if value & 1:
                self._start()
            case _:
                pass

    def _start(self) -> None:
        if self._thread or self._is_closed or not self._is_assigned:
            return
        size = int.from_bytes(self._buffer[2:6], "big")
        if not HEADER_SIZE <= size <= BUFFER_SIZE:
            self._status |= Status.FAILED
            return
        self._status &= ~Status.FAILED
        command = bytes(self._buffer[:size])
        self._thread = threading.Thread(target=self._execute, args=(command,), name="tpm")
        self._thread.start()

    def _execute(self, command: bytes) -> None:
        response = b""
        try:
            response = self._executor.execute(command)
        except VmmError as err:
            if not self._is_closed and str(err) != self._failure:  # a guest asks on and on
                self._failure = str(err)
                log.warning("tpm: %s", err)
        with self.lock:
            if HEADER_SIZE <= len(response) <= BUFFER_SIZE:
                self._buffer[: len(response)] = response
            else:
                self._status |= Status.FAILED
            self._thread = None
