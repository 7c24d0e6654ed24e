"""The terminal side of a console: raw mode and the escapes of cu(1).

The parser is pure; `RawTerminal` is the only thing here that touches a terminal.
"""

import enum
import os
import signal
import termios
import tty
from collections.abc import Iterator
from contextlib import suppress
from typing import Self

ESCAPES = "~.  power off and leave\n~#  send a BREAK\n~^Z suspend\n~~  send one ~\n~?  this list\n"


class Escape(enum.Enum):
    """Requests of the user to the console itself."""

    POWER_OFF = b"."
    BREAK = b"#"
    SUSPEND = b"\x1a"
    HELP = b"?"


class EscapeParser:
    """Find cu's escapes in the input: `~` at the start of a line, then one more character."""

    def __init__(self) -> None:
        """Begin at the start of a line."""
        self._at_line_start = True
        self._after_tilde = False

    def feed(self, typed: bytes) -> Iterator[bytes | Escape]:
        """Yield input for the guest, and escapes, in order."""
        plain = bytearray()
        for value in typed:
            char = bytes([value])
            if self._after_tilde:
                self._after_tilde = False
                if char in {escape.value for escape in Escape}:
                    if plain:
                        yield bytes(plain)
                        plain.clear()
                    self._at_line_start = True
                    yield Escape(char)
                    continue
                plain += b"~" if char == b"~" else b"~" + char
            elif char == b"~" and self._at_line_start:
                self._after_tilde = True
                continue
            else:
                plain += char
            self._at_line_start = char in b"\r\n"
        if plain:
            yield bytes(plain)


class RawTerminal:
    """A terminal in raw mode; a context manager that restores it.

    The descriptor stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        """Remember the terminal at `fd` as it is."""
        self._fd = fd
        self._saved = termios.tcgetattr(fd)

    def __enter__(self) -> Self:
        tty.setraw(self._fd, termios.TCSADRAIN)
        return self

    def __exit__(self, *exc: object) -> None:
        with suppress(termios.error):  # it has hung up: no reader is left
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)

    def suspend(self) -> None:
        """Give the terminal back and stop this process group until it is continued."""
        self.__exit__()
        os.kill(0, signal.SIGSTOP)
        self.__enter__()
