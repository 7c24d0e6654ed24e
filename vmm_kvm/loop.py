"""The event loop of a VM process: descriptors, timers, and calls posted by other threads.

One thread runs it; vCPU threads only post to it. It is also the machine's Clock. asyncio would do
the same, at the price of a slow import and a coroutine around every callback.

Locks: `_lock` guards the timers and the posted calls; no callback runs under it.
"""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Self

from vmm_kvm.clock import NANOSECONDS

_EPOLLIN = select.EPOLLIN


class LoopTimer:
    """A one-shot timer of an EventLoop; `arm` and `cancel` may be called from any thread."""

    __slots__ = ("_callback", "_loop", "deadline_ns")

    def __init__(self, loop: "EventLoop", callback: Callable[[], None]) -> None:
        """Make a disarmed timer; see `EventLoop.timer`."""
        self._loop = loop
        self._callback = callback
        self.deadline_ns: int | None = None

    def arm(self, deadline_ns: int) -> None:
        """Fire once at `deadline_ns` on the loop's clock, instead of any earlier deadline."""
        self._loop.schedule(self, deadline_ns)

    def cancel(self) -> None:
        """Forget the deadline; a callback that already runs is not waited for."""
        self.deadline_ns = None

    def fire(self) -> None:
        """Run the callback; called by the loop."""
        self._callback()


class EventLoop:
    """Waits for descriptors, timers and posted calls, and runs their callbacks one at a time.

    A context manager that owns its epoll and wake-up descriptors; the descriptors that it watches
    stay the caller's. `run` belongs to one thread; `call_soon`, `stop`, and timers to any.
    """

    def __init__(self) -> None:
        """Make a loop that watches nothing."""
        self._lock = threading.Lock()
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._readers: dict[int, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}
        self._arrivals: set[int] = set()
        self._posted: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[int, int, LoopTimer]] = []
        self._order = count()
        self._running = False
        self._stopped_at_ns: int | None = None
        self._lost_ns = 0

    def close(self) -> None:
        """Close the loop's own descriptors."""
        self._epoll.close()
        os.close(self._wake_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Clock

    def monotonic_ns(self) -> int:
        """Return nanoseconds that the VM has been running, from an arbitrary start."""
        now = time.monotonic_ns() if self._stopped_at_ns is None else self._stopped_at_ns
        return now - self._lost_ns

    def realtime_ns(self) -> int:
        """Return nanoseconds since 1970-01-01 UTC."""
        return time.time_ns()

    def stop_clock(self) -> None:
        """Stop `monotonic_ns` and all timers until `start_clock`."""
        if self._stopped_at_ns is None:
            self._stopped_at_ns = time.monotonic_ns()

    def start_clock(self) -> None:
        """Let time advance from where `stop_clock` stopped it."""
        if self._stopped_at_ns is not None:
            self._lost_ns += time.monotonic_ns() - self._stopped_at_ns
            self._stopped_at_ns = None
            self._wake()

    def timer(self, callback: Callable[[], None]) -> LoopTimer:
        """Make a disarmed timer; `callback` runs on the loop's thread."""
        return LoopTimer(self, callback)

    def schedule(self, timer: LoopTimer, deadline_ns: int) -> None:
        """Arm `timer`; called by it, from any thread."""
        with self._lock:
            timer.deadline_ns = deadline_ns
            heappush(self._timers, (deadline_ns, next(self._order), timer))
            is_next = self._timers[0][2] is timer
        if is_next:
            self._wake()

    # Descriptors; on the loop's thread only

    def add_reader(self, fd: int, callback: Callable[[], None]) -> bool:
        """Call `callback` while `fd` is readable; False for a file that cannot be waited for."""
        return self._watch(fd, self._readers, callback)

    def add_arrival_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` once whenever something arrives at `fd`, or it has room again.

        Data that it leaves there do not cause another call. `remove_reader` undoes it; `fd` can
        have no writer.
        """
        self._readers[fd] = callback
        self._arrivals.add(fd)
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    def add_writer(self, fd: int, callback: Callable[[], None]) -> bool:
        """Call `callback` while `fd` is writable; False for a file that cannot be waited for."""
        return self._watch(fd, self._writers, callback)

    def remove_reader(self, fd: int) -> None:
        """Stop calling the reader of `fd`, if it has one."""
        if self._readers.pop(fd, None):
            self._arrivals.discard(fd)
            self._update(fd)

    def remove_writer(self, fd: int) -> None:
        """Stop calling the writer of `fd`, if it has one."""
        if self._writers.pop(fd, None):
            self._update(fd)

    def _watch(
        self, fd: int, table: dict[int, Callable[[], None]], callback: Callable[[], None]
    ) -> bool:
        known = fd in self._readers or fd in self._writers
        table[fd] = callback
        try:
            if known:
                self._update(fd)
            else:
                self._epoll.register(fd, self._events(fd))
        except PermissionError:  # a regular file or directory: always ready
            del table[fd]
            return False
        return True

    def _events(self, fd: int) -> int:
        return (select.EPOLLIN if fd in self._readers else 0) | (
            select.EPOLLOUT if fd in self._writers else 0
        )

    def _update(self, fd: int) -> None:
        events = self._events(fd)
        if events:
            self._epoll.modify(fd, events)
        else:
            self._epoll.unregister(fd)

    # Running

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the loop's thread; from any thread or signal handler."""
        self._posted.append(callback)
        self._wake()

    def stop(self) -> None:
        """Let `run` return after the current callback; from any thread."""
        self._running = False
        self._wake()

    def run(self) -> None:
        """Serve until `stop`."""
        self._running = True
        while self._running:
            for fd, events in self._epoll.poll(self._timeout_s()):
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                    continue
                reader = self._readers.get(fd)
                if reader and events == _EPOLLIN:  # nearly always
                    reader()
                    continue
                # An error or a hang-up shows at the next read or write.
                failed = events & (select.EPOLLERR | select.EPOLLHUP)
                if reader and (events & select.EPOLLIN or failed or fd in self._arrivals):
                    reader()
                writer = self._writers.get(fd)
                if writer and (events & select.EPOLLOUT or failed):
                    writer()
            if self._timers:
                self._run_timers()
            if self._posted:
                for _ in range(len(self._posted)):
                    self._posted.popleft()()

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _timeout_s(self) -> float:
        if self._posted:
            return 0
        if not self._timers:  # the thread that adds the first one wakes us
            return -1
        with self._lock:
            if self._stopped_at_ns is not None or not self._timers:
                return -1
            return max(0, self._timers[0][0] - self.monotonic_ns()) / NANOSECONDS

    def _run_timers(self) -> None:
        if self._stopped_at_ns is not None:
            return
        now = self.monotonic_ns()
        due = []
        with self._lock:
            while self._timers and self._timers[0][0] <= now:
                deadline_ns, _, timer = heappop(self._timers)
                # A timer that was cancelled or armed anew left its old entry behind.
                if timer.deadline_ns == deadline_ns:
                    timer.deadline_ns = None
                    due.append(timer)
        for timer in due:
            timer.fire()
