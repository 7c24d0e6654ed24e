"""Clients' files: control keeps them, gives parcels to others, and closes them in the end.

To close a client's file may take as long as its file system likes, and in the kernel nothing can
end the wait. So one thread for each user closes that user's files, one after the other. A user
whose files are not closed is not read from: that keeps the number of descriptors within bounds.

A file of an ordinary user is kept until nobody has its parcel any more, so that the last reference
goes here. Administrators can hold up the daemon as they like: theirs are closed at once, and the
locks on them end with the VM.

Source: `vmd.wire.parcels`
"""

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Protocol

from vmd.wire.channel import Fds
from vmd.wire.parcels import unwrap, wrap
from vmm_kvm.log import Log

log = Log(__name__)

FILES_PER_USER = 2048
"""Of an ordinary user, in all VMs and requests."""
UNCLOSED_MAX = 128
"""Files of a user that wait to be closed; with more, nothing is read from that user."""


class Loop(Protocol):
    """The event loop, as far as it is needed."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> bool:
        """Call `callback` while `fd` is readable, or has hung up."""

    def remove_reader(self, fd: int) -> None:
        """Forget the reader of `fd`."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the loop's thread; from any thread."""


class ClientFiles:
    """All files that clients have passed; for the loop's thread."""

    def __init__(
        self, loop: Loop, administrators: Collection[int], on_room: Callable[[int], None]
    ) -> None:
        """Begin without any; `on_room` is called with a user when files of it have been closed."""
        self._loop = loop
        self._administrators = administrators
        self._on_room = on_room
        self._counts = Counter[int]()
        self._unclosed = Counter[int]()
        self._queues: dict[int, deque[int]] = {}  # what waits, by user
        self._workers: set[int] = set()  # users that a thread works for
        self._lock = threading.Lock()

    def take(self, uid: int, fds: Sequence[int]) -> list[int] | None:
        """Return parcels with files of a user; takes over `fds`.

        None if there cannot be as many parcels.
        """
        parcels: list[int] = []
        left = deque(fds)
        try:
            if self._counts[uid] + len(fds) > FILES_PER_USER and uid not in self._administrators:
                return None
            while left:
                parcel, keeper = wrap(left[0])
                parcels.append(parcel)
                self._keep(uid, left.popleft(), keeper)
        except OSError:
            Fds(parcels).close()
            return None
        finally:
            self._close(uid, left)
        return parcels

    def keep(self, uid: int, parcel: int, keeper: int) -> None:
        """Keep the file of a parcel that another process has made; takes over both descriptors."""
        fd = None
        with suppress(OSError):  # no descriptors left: the holder of the last reference waits
            fd = unwrap(parcel)
        if fd is None:
            os.close(keeper)
        else:
            self._keep(uid, fd, keeper)
        os.close(parcel)

    def is_behind(self, uid: int) -> bool:
        """Tell whether so many files of a user wait to be closed that no more are taken."""
        return self._unclosed[uid] > UNCLOSED_MAX

    def _keep(self, uid: int, fd: int, keeper: int) -> None:
        if uid in self._administrators:
            os.close(keeper)
            self._close(uid, [fd])
            return

        def let_go() -> None:
            self._loop.remove_reader(keeper)
            os.close(keeper)
            self._counts[uid] -= 1
            self._close(uid, [fd])

        self._counts[uid] += 1
        self._loop.add_reader(keeper, let_go)

    # Closing

    def _close(self, uid: int, fds: Collection[int]) -> None:
        if not fds:
            return
        self._counts[uid] += len(fds)
        self._unclosed[uid] += len(fds)
        with self._lock:
            self._queues.setdefault(uid, deque()).extend(fds)
            if uid in self._workers:
                return
            self._workers.add(uid)
        try:
            threading.Thread(target=self._work, args=(uid,), daemon=True).start()
        except RuntimeError as err:  # no threads left: the user's next file brings one
            log.warning("files of uid %d are not closed yet: %s", uid, err)
            self._workers.discard(uid)

    def _work(self, uid: int) -> None:
        """Close the pending files of a user: a thread's work."""
        while True:
            with self._lock:
                queue = self._queues[uid]
                if not queue:
                    del self._queues[uid]
                    self._workers.discard(uid)
                    return
                fd = queue.popleft()
            with suppress(OSError):  # its file system says that it could not write all
                os.close(fd)
            self._loop.call_soon(lambda: self._closed(uid))

    def _closed(self, uid: int) -> None:
        for counts in (self._counts, self._unclosed):
            counts[uid] -= 1
            if not counts[uid]:
                del counts[uid]
        self._on_room(uid)
