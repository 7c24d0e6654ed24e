"""A TPM by swtpm: its control channel, and the channel of commands.

swtpm is a process of its own that emulates a TPM 2.0 and keeps its secrets in a directory. Each
machine has one; whoever starts it owns the process, and has both channels connected.

Source: swtpm(8); swtpm's man/man3/swtpm_ioctls.pod; TCG TPM 2.0 Library, part 1 §18
"""

import socket
import struct
from contextlib import suppress
from typing import Self

from vmm_kvm.errors import VmmError

CONTROL_S = 10.0
"""How long swtpm may take to answer on its control channel."""
COMMAND_S = 300.0
"""How long a command may take: making a large RSA key takes longest."""

_INIT, _CANCEL = 0x02, 0x09
_RESULT = struct.Struct(">I")
_HEADER = struct.Struct(">HII")  # tag, size, code
_RESPONSE_MAX = 4096
_IN_USE = 9  # TPM_FAIL: what swtpm says where it cannot read its state


def arguments(control: int, data: int, directory: str) -> list[str]:
    """Return swtpm's arguments: the descriptors of its channels, and where its state is."""
    return [
        *("socket", "--tpm2", "--tpmstate", f"dir={directory},mode=0600", "--terminate"),
        *("--ctrl", f"type=unixio,clientfd={control}", "--fd", str(data)),
    ]


class SwtpmError(VmmError):
    """swtpm does not answer, or refuses; `str()` is one line."""


class Swtpm:
    """A connection to a swtpm process; an `Executor` of `tpm_crb`, and a context manager."""

    def __init__(self, control: socket.socket, data: socket.socket) -> None:
        """Take over its channels, that of control and that of commands."""
        self._control = control
        self._data = data
        control.settimeout(CONTROL_S)
        data.settimeout(COMMAND_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect: swtpm ends, if it was started with --terminate. Idempotent."""
        self._control.close()
        self._data.close()

    def power_on(self) -> None:
        """Begin as after a reset of the machine; what is kept in it stays.

        Raises:
            SwtpmError: it does not answer, or cannot read its state.
        """
        result = self._ask(_INIT, bytes(4))
        if result == _IN_USE:
            raise SwtpmError("swtpm cannot use its state: another VM has it, or it is damaged")
        if result:
            raise SwtpmError(f"swtpm does not begin: error {result:#x}")

    def execute(self, command: bytes) -> bytes:
        """Return the response to a command.

        Raises:
            SwtpmError: none came within `COMMAND_S`, or it is none.
        """
        try:
            self._data.sendall(command)
            response = self._receive(_HEADER.size)
            size = _HEADER.unpack(response)[1]
            if not _HEADER.size <= size <= _RESPONSE_MAX:
                raise SwtpmError(f"a response of {size} bytes")
            return response + self._receive(size - _HEADER.size)
        except TimeoutError:
            raise SwtpmError("swtpm does not answer") from None
        except OSError as err:
            raise SwtpmError(f"swtpm: {err.strerror or err}") from err

    def cancel(self) -> None:
        """Have a command that runs end soon; any thread, but only one at a time."""
        try:
            self._control.sendall(_RESULT.pack(_CANCEL))
            self._control.recv(_RESULT.size)
        except OSError:
            self.abandon()  # a swtpm that does not answer here does not answer there

    def abandon(self) -> None:
        """Give up: a command that runs fails at once, and every later one; any thread."""
        with suppress(OSError):  # it has ended
            self._data.shutdown(socket.SHUT_RDWR)

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._data.recv(size - len(data))
            if not piece:
                raise SwtpmError("swtpm has ended")
            data += piece
        return data

    def _ask(self, command: int, body: bytes) -> int:
        """Return the result of a command on the control channel; 0 is success."""
        try:
            self._control.sendall(_RESULT.pack(command) + body)
            answer = self._control.recv(_RESULT.size)
        except OSError as err:
            raise SwtpmError(f"swtpm: {err.strerror or err}") from err
        if len(answer) < _RESULT.size:
            raise SwtpmError("swtpm has ended")
        result: int = _RESULT.unpack(answer)[0]
        return result
