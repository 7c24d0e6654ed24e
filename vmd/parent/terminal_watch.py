"""Callbacks for the opening and closing of terminals' slave sides.

Linux has no other way to tell a master that its terminal was opened. A user may have few inotify
descriptors, 128 by default, so one serves all terminals, in the process that can open files.

Source: inotify(7)
"""

import ctypes
import os
import struct
from collections.abc import Callable

from vmm_kvm.libc import LIBC
from vmm_kvm.loop import EventLoop

MERGED_NS = 20_000_000
"""How often a VM may be told that its terminal was opened or closed."""
_IN_OPEN = 0x20
_IN_CLOSE = 0x18
_IN_CLOEXEC_NONBLOCK = os.O_CLOEXEC | os.O_NONBLOCK
_EVENT = struct.Struct("=iIII")  # struct inotify_event, without the name
_LOST_SOME = -1  # whose event says that there were too many
_READ_SIZE = 64 << 10


def _checked(result: int, *path: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *path)
    return result


class TerminalWatch:
    """Watches terminals, on the event loop's thread."""

    def __init__(self, loop: EventLoop) -> None:
        """Watch none yet.

        Raises:
            OSError: the host has no descriptors of that kind left.
        """
        self._loop = loop
        self._fd = _checked(int(LIBC.inotify_init1(_IN_CLOEXEC_NONBLOCK)))
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._timer = loop.timer(self._listen)
        self._listen()

    def close(self) -> None:
        """Watch no more."""
        self._timer.cancel()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _listen(self) -> None:
        self._loop.add_reader(self._fd, self._read)

    def add(self, path: str, callback: Callable[[], None]) -> int:
        """Call `callback` at each opening or closing of `path`; returns the watch, for removal.

        Raises:
            OSError: there is no such file, or there are too many.
        """
        mask = _IN_OPEN | _IN_CLOSE
        watch = int(LIBC.inotify_add_watch(self._fd, os.fsencode(path), mask))
        self._callbacks[_checked(watch, path)] = callback
        return watch

    def remove(self, watch: int) -> None:
        """Forget a file, which may be gone."""
        self._callbacks.pop(watch, None)
        LIBC.inotify_rm_watch(self._fd, watch)

    def _read(self) -> None:
        """Call back once for each file, however often it was opened meanwhile.

        Then wait before reading again: a user may open and close a terminal without end.
        """
        self._loop.remove_reader(self._fd)
        self._timer.arm(self._loop.monotonic_ns() + MERGED_NS)
        try:
            data = os.read(self._fd, _READ_SIZE)
        except BlockingIOError:
            return
        changed = set()
        at = 0
        while at < len(data):
            watch, _mask, _cookie, name_size = _EVENT.unpack_from(data, at)
            changed.add(watch)
            at += _EVENT.size + name_size
        for watch, callback in tuple(self._callbacks.items()):
            if watch in changed or _LOST_SOME in changed:
                callback()
