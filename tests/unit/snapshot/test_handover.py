"""The hand-over of a VM: after any messages, at most one of the two sides runs it."""

from __future__ import annotations

import pytest

from vmm_kvm.errors import SnapshotError
from vmm_kvm.snapshot.handover import (
    GO,
    RUNNING,
    InDoubtError,
    await_go,
    failed,
    hand_over,
    say_ready,
    why_gone,
)


class Line:
    """One direction: written data are read; at its end, the peer is gone."""

    def __init__(self, data: bytes = b"", *, breaks: bool = False) -> None:
        self.data = data
        self.breaks = breaks
        self.is_cancelled_no_more = False

    def write(self, data: bytes) -> None:
        """Take all of it, or fail."""
        if self.breaks:
            raise BrokenPipeError
        self.data += data

    def readinto(self, view: memoryview) -> int:
        """Give some bytes."""
        count = min(len(view), 5, len(self.data))
        view[:count], self.data = self.data[:count], self.data[count:]
        return count

    def cancel_no_more(self) -> None:
        """Note it."""
        self.is_cancelled_no_more = True


def ready() -> bytes:
    """Return a receiver's first message."""
    line = Line()
    say_ready(line)
    return line.data


def test_it_runs_there() -> None:
    """The disks are released before the receiver may run, and not taken back."""
    sink, said, lent = Line(), Line(ready() + RUNNING), list[bool]()
    hand_over(sink, said, lent.append)
    assert (sink.data, lent) == (GO, [True])
    assert said.is_cancelled_no_more
    await_go(sink)


@pytest.mark.parametrize(
    "heard", [b"", b"ready", failed("no room"), b"x" * 2000, b"hello\n" + RUNNING]
)
def test_it_is_not_ready(heard: bytes) -> None:
    """A receiver that is not ready never gets leave to run."""
    sink, lent = Line(), list[bool]()
    with pytest.raises(SnapshotError) as caught:
        hand_over(sink, Line(heard), lent.append)
    assert not isinstance(caught.value, InDoubtError)
    assert (sink.data, lent) == (b"", [])
    with pytest.raises(SnapshotError, match="has not let go"):
        await_go(sink)


def test_leave_cannot_be_given() -> None:
    """If the connection ends before leave is given, the disks are taken back."""
    lent: list[bool] = []
    with pytest.raises(BrokenPipeError):
        hand_over(Line(breaks=True), Line(ready() + RUNNING), lent.append)
    assert lent == [True, False]


def test_it_fails_there() -> None:
    """If the receiver reports that it never runs, the disks are taken back, if possible."""
    lent: list[bool] = []
    with pytest.raises(SnapshotError, match="the receiver says: no room") as caught:
        hand_over(Line(), Line(ready() + failed("no room")), lent.append)
    assert not isinstance(caught.value, InDoubtError)
    assert lent == [True, False]

    def lend(is_lent: bool) -> None:
        if not is_lent:
            raise SnapshotError("in use")

    with pytest.raises(InDoubtError, match="no room; and here: in use"):
        hand_over(Line(), Line(ready() + failed("no room")), lend)


@pytest.mark.parametrize("heard", [b"", RUNNING[:-1], b"what?\n"])
def test_nobody_knows(heard: bytes) -> None:
    """Once leave is given, only the receiver can say that it does not run."""
    lent: list[bool] = []
    with pytest.raises(InDoubtError, match="nobody knows whether it runs there"):
        hand_over(Line(), Line(ready() + heard), lent.append)
    assert lent == [True]


@pytest.mark.parametrize("heard", [b"", GO[:-1], GO.upper()])
def test_a_receiver_without_leave(heard: bytes) -> None:
    """A receiver without leave does not run."""
    with pytest.raises(SnapshotError):
        await_go(Line(heard))


def test_what_fails_is_one_line() -> None:
    """Any error becomes one line for the sender that a terminal may show."""
    line = failed("a\nb\x1b" + "c" * 5000)
    assert (line.count(b"\n"), len(line)) == (1, 1024)
    assert line.startswith(b"vmm-kvm: failed: a\\x0ab\\x1bc")


@pytest.mark.parametrize(
    ("heard", "why"),
    [
        (failed("no room"), "no room"),
        (ready() + failed("no room"), "no room"),
        (b"command not found\n", "command not found"),
        (b"", None),
        (ready(), None),
        (b"half a line", None),
    ],
)
def test_a_receiver_that_has_gone(heard: bytes, why: str | None) -> None:
    """The receiver's last message is the reason, if there is one."""
    found = why_gone(Line(heard))
    assert (found and str(found)) == (why and f"the receiver says: {why}")
