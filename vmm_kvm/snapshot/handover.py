"""The hand-over of a VM that moves: of two copies at most one runs, and if none does, one says so.

    sender                          receiver
    stands still, all is sent  ──▶  checks all of it
                               ◀──  READY
    lets go of the disks
    GO                         ──▶  takes the disks, builds the machine
                               ◀──  RUNNING, and runs; or FAILED, and never does
    ends; or takes the disks back, and goes on

Until GO the VM is the sender's: whatever happens, the receiver does not run. After GO the sender
goes on only if the receiver has said FAILED. If it hears nothing, nobody can know: it keeps
standing still.

GO follows the stream's checksum; what the receiver says is lines of text the other way.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from vmm_kvm.errors import SnapshotError, VmmError
from vmm_kvm.text import printable

GO = b"vmm-kvm: go\n"
_READY, _RUNNING, _FAILED = "vmm-kvm: ready", "vmm-kvm: running", "vmm-kvm: failed: "
_COPY = "vmm-kvm: copy disks:"
READY = f"{_READY}\n".encode()
"""Tells the sender that all has arrived."""
RUNNING = f"{_RUNNING}\n".encode()
"""Tells the sender that the VM runs at the receiver; right before it does."""
_LINE_MAX = 1024


class InDoubtError(SnapshotError):
    """The VM may run elsewhere: it must not go on here unless somebody knows better."""


class Sink(Protocol):
    """Takes bytes."""

    def write(self, data: bytes) -> None:
        """Write all of it."""


class Source(Protocol):
    """Gives bytes."""

    def readinto(self, view: memoryview) -> int:
        """Read at least one byte; 0 at the end."""

    def cancel_no_more(self) -> None:
        """Ignore cancelling from now on."""


def hand_over(sink: Sink, answers: Source, lend: Callable[[bool], None]) -> None:
    """Let the receiver of a VM run it, as soon as it is ready; the VM stands still.

    Args:
        sink: where the stream went, all of it.
        answers: lines of the receiver.
        lend: lets go of the disks, with True, or takes them back.

    Raises:
        InDoubtError: it may run there.
        SnapshotError, VmmError, OSError: it does not, and never will; the disks are held again.
    """
    line = _read_line(answers)
    if line != _READY:
        raise SnapshotError(f"the receiver says: {line.removeprefix(_FAILED)}")
    try:
        lend(True)
        sink.write(GO)  # at once or not at all: so few bytes are not divided
    except BaseException:
        lend(False)
        raise
    answers.cancel_no_more()
    try:
        line = _read_line(answers)
    except (VmmError, OSError) as err:
        raise InDoubtError(f"nobody knows whether it runs there: {err}") from err
    if line == _RUNNING:
        return
    if not line.startswith(_FAILED):
        raise InDoubtError(f"nobody knows whether it runs there: the receiver says: {line}")
    text = line.removeprefix(_FAILED)
    try:
        lend(False)
    except (VmmError, OSError) as err:
        raise InDoubtError(f"the receiver says: {text}; and here: {err}") from err
    raise SnapshotError(f"the receiver says: {text}")


def why_gone(answers: Source) -> SnapshotError | None:
    """Return why the receiver does not take the stream any more, if it has said so.

    Only before GO was written: then it does not run.
    """
    try:
        line = _read_line(answers)
    except (VmmError, OSError):
        return None
    if line == _READY:
        try:
            line = _read_line(answers)
        except (VmmError, OSError):
            return None
    return SnapshotError(f"the receiver says: {line.removeprefix(_FAILED)}")


def say_ready(sink: Sink) -> None:
    """Tell the sender that all has arrived.

    Raises:
        SnapshotError, OSError: it cannot be told.
    """
    sink.write(READY)


def wanted_disks(disks: Iterable[int]) -> bytes:
    """Return what tells the sender which of its disks to copy, by their places."""
    return " ".join([_COPY, *map(str, disks)]).encode() + b"\n"


def await_wanted_disks(answers: Source, count: int) -> frozenset[int]:
    """Return which of the `count` disks the receiver wants copied, by their places.

    Raises:
        SnapshotError: it does not take the VM, or says something else.
        OSError: it is gone.
    """
    line = _read_line(answers)
    words = line.removeprefix(_COPY).split()
    if line.startswith(_COPY) and all(word.isascii() and word.isdecimal() for word in words):
        disks = frozenset(map(int, words))
        if all(disk < count for disk in disks):
            return disks
    raise SnapshotError(f"the receiver says: {line.removeprefix(_FAILED)}")


def await_go(source: Source) -> None:
    """Return when the sender has let go of the VM.

    Raises:
        SnapshotError, OSError: it has not, or is gone: then the VM is the sender's.
    """
    got = b""
    while len(got) < len(GO):
        piece = bytearray(len(GO) - len(got))
        count = source.readinto(memoryview(piece))
        if not count:
            raise SnapshotError("the sender has not let go of it")
        got += piece[:count]
    if got != GO:
        raise SnapshotError("the sender says something else than to go on")


def failed(text: str) -> bytes:
    """Return what tells the sender that the VM does not run here, and never will."""
    return f"{_FAILED}{printable(text)}".encode()[: _LINE_MAX - 1] + b"\n"


def _read_line(source: Source) -> str:
    line = bytearray()
    piece = bytearray(1)
    while len(line) < _LINE_MAX:
        if not source.readinto(memoryview(piece)):
            raise SnapshotError("the connection to the receiver has ended")
        if piece == b"\n":
            return printable(line.decode(errors="replace"))
        line += piece
    raise SnapshotError("the receiver says too much")
