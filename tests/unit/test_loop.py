"""The event loop: descriptors, timers, posted calls, and a clock that can be stopped."""

import os
import threading
from functools import partial
from pathlib import Path

from vmm_kvm.loop import EventLoop

MS = 1_000_000


def test_timers_fire_in_order() -> None:
    """Timers fire by deadline, in any order of arming."""
    fired: list[str] = []
    with EventLoop() as loop:
        now = loop.monotonic_ns()
        late = loop.timer(lambda: fired.append("late"))
        end = loop.timer(loop.stop)
        early = loop.timer(lambda: fired.append("early"))
        end.arm(now + 3 * MS)
        late.arm(now + 2 * MS)
        early.arm(now + MS)
        loop.run()
    assert fired == ["early", "late"]


def test_cancelled_and_rearmed_timers() -> None:
    """A cancelled timer does not fire; one that is armed again fires once, at its new deadline."""
    fired: list[str] = []
    with EventLoop() as loop:
        now = loop.monotonic_ns()
        cancelled = loop.timer(lambda: fired.append("cancelled"))
        cancelled.arm(now + MS)
        cancelled.cancel()
        moved = loop.timer(lambda: fired.append("moved"))
        moved.arm(now + MS)
        moved.arm(now + 2 * MS)
        end = loop.timer(loop.stop)
        end.arm(now + 4 * MS)
        loop.run()
    assert fired == ["moved"]


def test_calls_from_other_threads() -> None:
    """A call that another thread posts wakes the loop and runs on the loop's thread."""
    ran_on: list[threading.Thread] = []

    def post() -> None:
        loop.call_soon(lambda: ran_on.append(threading.current_thread()))
        loop.call_soon(loop.stop)

    with EventLoop() as loop:
        thread = threading.Thread(target=post)
        thread.start()
        loop.run()
        thread.join()
    assert ran_on == [threading.current_thread()]


def test_readers_and_writers() -> None:
    """A pipe's ends are called when they are ready, and not after their removal."""
    read_fd, write_fd = os.pipe()
    got: list[bytes] = []

    def write() -> None:
        os.write(write_fd, b"x")
        loop.remove_writer(write_fd)

    def read() -> None:
        got.append(os.read(read_fd, 10))
        loop.remove_reader(read_fd)
        loop.stop()

    with EventLoop() as loop:
        assert loop.add_reader(read_fd, read)
        assert loop.add_writer(write_fd, write)
        loop.run()
    os.close(read_fd)
    os.close(write_fd)
    assert got == [b"x"]


def test_a_callback_may_remove_another_descriptor() -> None:
    """An event for a descriptor that an earlier callback of the same round removed is dropped."""
    pipes = [os.pipe(), os.pipe()]
    called: list[int] = []

    def read(fd: int) -> None:
        called.append(fd)
        for read_fd, _ in pipes:
            loop.remove_reader(read_fd)
            os.close(read_fd)
        loop.stop()

    with EventLoop() as loop:
        for read_fd, write_fd in pipes:
            os.close(write_fd)  # a hang-up, which shows in every round
            loop.add_reader(read_fd, partial(read, read_fd))
        loop.run()
    assert len(called) == 1


def test_regular_files_cannot_be_watched(tmp_path: Path) -> None:
    """Watching a regular file is refused: it is always ready."""
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    with EventLoop() as loop:
        assert not loop.add_reader(fd, loop.stop)
    os.close(fd)


def test_stopped_clock() -> None:
    """A stopped clock does not advance; afterwards it continues from the same time."""
    with EventLoop() as loop:
        loop.stop_clock()
        before = loop.monotonic_ns()
        timer = loop.timer(loop.stop)
        timer.arm(before + MS)
        assert before == loop.monotonic_ns()
        loop.start_clock()
        loop.run()
        assert loop.monotonic_ns() >= before + MS
