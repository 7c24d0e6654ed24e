"""Opening and closing of terminals, watched by one descriptor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest

from vmd.parent.terminal_watch import TerminalWatch
from vmd.shared.pty import open_pty
from vmm_kvm.loop import EventLoop


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    """Return an event loop."""
    with EventLoop() as made:
        yield made


def _run_for_a_moment(loop: EventLoop) -> None:
    timer = loop.timer(loop.stop)
    timer.arm(loop.monotonic_ns() + 50_000_000)
    loop.run()


def test_who_is_told(loop: EventLoop) -> None:
    """A terminal's callback gets its opening and closing, once, until it is removed."""
    told: list[str] = []
    with ExitStack() as stack:
        watch = TerminalWatch(loop)
        stack.callback(watch.close)
        one, other = (open_pty(name, os.getuid(), None) for name in ("one", "other"))
        stack.callback(one.close)
        stack.callback(other.close)
        of_one = watch.add(one.name, lambda: told.append("one"))
        watch.add(other.name, lambda: told.append("other"))
        os.close(os.open(one.name, os.O_RDWR | os.O_NOCTTY))
        _run_for_a_moment(loop)
        assert told == ["one"]
        watch.remove(of_one)
        for name in (one.name, other.name):
            os.close(os.open(name, os.O_RDWR | os.O_NOCTTY))
        _run_for_a_moment(loop)
        assert told == ["one", "other"]


def test_hundreds_of_terminals(loop: EventLoop) -> None:
    """More terminals are watched than a user may have inotify descriptors."""
    told: list[int] = []
    with ExitStack() as stack:
        watch = TerminalWatch(loop)
        stack.callback(watch.close)
        for number in range(150):
            pty = open_pty("many", os.getuid(), None)
            stack.callback(pty.close)
            watch.add(pty.name, partial(told.append, number))
        os.close(os.open(pty.name, os.O_RDWR | os.O_NOCTTY))
        _run_for_a_moment(loop)
    assert told == [149]


def test_a_terminal_that_is_not_there(loop: EventLoop) -> None:
    """A terminal that cannot be watched is an error that names it."""
    watch = TerminalWatch(loop)
    with pytest.raises(FileNotFoundError, match="/dev/pts/none"):
        watch.add("/dev/pts/none", lambda: None)
    watch.close()
