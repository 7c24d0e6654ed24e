"""Standard input, output and error of our programs: always open, with write errors reported.

A program that is started with one of descriptors 0 to 2 closed (`>&-`) gets that number for the
first file that it opens: the console would be written to a disk image that became descriptor 1. So
every program begins with `run_program`, before any other code opens a file.

Standard output carries a program's result: if it cannot be written, that is an error, one line on
standard error and status 1; the line is left out if the reader has closed the pipe. Messages on a
standard error that cannot be written are lost, without consequence.

Names of files are bytes. On both streams, bytes that are no text in the user's encoding are written
as they are, and characters that the encoding lacks as escapes.
"""

import codecs
import io
import os
import sys
from collections.abc import Callable

TYPE_CHECKING = False  # as in `vmm_kvm.record`
if TYPE_CHECKING:
    from typing import NoReturn, TextIO

_EXIT_ERROR = 1
_NAMES = "vmm_kvm.names"
"""Handler of characters that the encoding lacks: see `_as_bytes`."""
_BYTE = 0xDC00
"""With a byte from 0x80 on added, what Python has for one that was no text (PEP 383)."""


class OutputError(Exception):
    """Standard output cannot be written; the cause says why.

    It is no OSError: code that expects one for a file of its own must not take this for it.
    """


def open_standard_descriptors() -> None:
    """Open /dev/null on each of descriptors 0 to 2 that is closed, and make Python's stream of it.

    Standard input then ends at once. Standard output is opened for reading: what is written to it
    fails, as it does where the shell has closed it, instead of vanishing. Child processes inherit
    all three.

    Raises:
        OSError: there is no /dev/null.
    """
    for fd, name, flags, mode in (
        (0, "stdin", os.O_RDONLY, "r"),
        (1, "stdout", os.O_RDONLY, "w"),
        (2, "stderr", os.O_WRONLY, "w"),
    ):
        try:
            os.fstat(fd)
        except OSError:  # closed: then it is the lowest free one, and the next to be given
            os.set_inheritable(os.open(os.devnull, flags), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115 - for good


class _Written(io.RawIOBase):
    """A descriptor that is written; after the first failure all else is dropped."""

    def __init__(self, fd: int, *, is_result: bool) -> None:
        """Write to `fd`, which stays the caller's; only of results a failure is an error."""
        super().__init__()
        self._fd = fd
        self._is_result = is_result
        self._has_failed = False

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        assert isinstance(data, memoryview)  # a BufferedWriter writes nothing else
        size = data.nbytes
        if self._has_failed:
            return size
        while True:
            try:
                return os.write(self._fd, data)
            except BlockingIOError:  # another program made a shared descriptor non-blocking
                _wait_for_room(self._fd)
            except OSError as err:
                self._has_failed = True
                if self._is_result:
                    raise OutputError from err
                return size


def _wait_for_room(fd: int) -> None:
    import select  # noqa: PLC0415 - hardly ever needed

    select.select((), (fd,), ())


def run_program(name: str, body: Callable[[], int]) -> "NoReturn":
    """Be the program `name`: run `body`, and exit with the status that it returns.

    Standard output that cannot be written is status 1, and a line on standard error unless its
    reader has left.
    """
    open_standard_descriptors()
    sys.stdout = _replaced(sys.stdout, is_result=True)
    sys.stderr = _replaced(sys.stderr, is_result=False)
    try:
        try:
            status = body()
        finally:
            sys.stdout.flush()
    except OutputError as err:
        status = _EXIT_ERROR
        if isinstance(err.__cause__, OSError) and not isinstance(err.__cause__, BrokenPipeError):
            line = f"{name}: standard output: {err.__cause__.strerror}"
            print(line, file=sys.stderr)  # noqa: T201 - a program's own line
    sys.exit(status)


def _as_bytes(err: UnicodeError) -> tuple[bytes, int]:
    """Encode what an encoding has no bytes for; called by the codec."""
    if not isinstance(err, UnicodeEncodeError):
        raise err
    data = b""
    for one in err.object[err.start : err.end]:
        number = ord(one)
        if _BYTE + 0x80 <= number <= _BYTE + 0xFF:
            data += bytes((number - _BYTE,))
        else:
            data += one.encode("ascii", "backslashreplace")
    return data, err.end


codecs.register_error(_NAMES, _as_bytes)


def _replaced(stream: "TextIO", *, is_result: bool) -> io.TextIOWrapper:
    """Return a stream like `stream`, one of Python's own, over a `_Written`."""
    assert isinstance(stream, io.TextIOWrapper)
    return io.TextIOWrapper(
        io.BufferedWriter(_Written(stream.fileno(), is_result=is_result)),
        encoding=stream.encoding,
        errors=_NAMES,
        line_buffering=stream.line_buffering or stream.write_through or not is_result,
    )
