"""The parent's side of openers: processes with a client's rights that open that client's files.

Each serves one start, and has a time limit: the file system of a client may never answer. A killed
one that does not end, because the kernel waits for such a file system, counts against its user
until it does.
"""

import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from vmd.confine.confinements import Kind
from vmd.confine.sandbox import kill_as
from vmd.rules.policy import Users
from vmd.shared.opening import Files, OpeningError
from vmd.shared.privsep import Plan, spawn
from vmd.wire.channel import Channel, ChannelError, Fds, OversizeError, Received
from vmd.wire.files import (
    PARENT_AND_OPENER,
    FilesOpened,
    FoundFile,
    OpenerToParent,
    OpenFiles,
    OpeningFailed,
    WantedFile,
)
from vmd.wire.messages import ErrorCode
from vmd.wire.parcels import opened
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop, LoopTimer

log = Log(__name__)

TIME_LIMIT_S = 10
"""How long opening a client's files may take."""
OPENERS_PER_USER = 4
"""At a time; further starts of the user are refused."""

Then = Callable[[list[FoundFile], list[int]], None]
"""Called when the files are open; takes over the descriptors."""
Keep = Callable[[int, int, int], None]
"""Takes over a parcel of a user's, and its keeper."""
Else = Callable[[OpeningError], None]
"""Called when one is unavailable."""


class _Opener:
    """A process, until it is reaped."""

    def __init__(
        self, uid: int, channel: Channel[OpenFiles, OpenerToParent], then: Then, otherwise: Else
    ) -> None:
        self.uid = uid
        self.channel = channel
        self.then = then
        self.otherwise: Else | None = otherwise
        """None once it has been answered."""
        self.timer: LoopTimer | None = None


class Openers:
    """All openers, on the event loop's thread."""

    def __init__(self, loop: EventLoop, users: Users, plan: Callable[[int], Plan]) -> None:
        """Begin without any; `plan` returns how to make one for a user id."""
        self._loop = loop
        self.users = users
        self._plan = plan
        self._openers: dict[int, _Opener] = {}
        self.keep: Keep = lambda _uid, *fds: Fds(fds).close()
        """Called with the keepers of new parcels: the parent itself has only the parcels."""

    @property
    def pids(self) -> Collection[int]:
        """Those that have not been reaped."""
        return self._openers.keys()

    def open(
        self, uid: int, wanted: Sequence[WantedFile], passed: list[int], then: Then, otherwise: Else
    ) -> None:
        """Open files with the rights of a user; takes ownership of `passed`.

        For an administrator this process opens them at once.
        """
        if uid in self.users.administrators:
            self._open_here(wanted, passed, then, otherwise)
            return
        fds = Fds(passed)
        per_user = Counter(opener.uid for opener in self._openers.values())
        if per_user[uid] >= OPENERS_PER_USER:
            fds.close()
            otherwise(OpeningError(ErrorCode.EAGAIN, "too many starts of yours wait for files"))
            return
        try:
            child = spawn(self._plan(uid))
        except OSError as err:
            fds.close()
            otherwise(OpeningError(ErrorCode.EAGAIN, f"{Kind.OPENER}: {err.strerror}"))
            return
        channel = Channel(child.connection, PARENT_AND_OPENER)
        opener = self._openers[child.pid] = _Opener(uid, channel, then, otherwise)
        opener.timer = self._loop.timer(lambda: self._kill(child.pid))
        opener.timer.arm(self._loop.monotonic_ns() + TIME_LIMIT_S * NANOSECONDS)
        channel.watch(
            self._loop,
            lambda received: self._answered(opener, received),
            lambda err: self._fail(opener, ErrorCode.EIO, f"the files cannot be opened: {err}"),
        )
        try:
            channel.send(OpenFiles(files=tuple(wanted)), fds.take_all())
        except (ChannelError, OversizeError) as err:
            channel.close()  # it ends then
            self._fail(opener, ErrorCode.EIO, str(err))

    @staticmethod
    def _open_here(
        wanted: Sequence[WantedFile], passed: list[int], then: Then, otherwise: Else
    ) -> None:
        with Files() as files:
            try:
                with Fds(opened(passed)) as fds:
                    files.open(wanted, fds)
            except OpeningError as err:
                otherwise(err)
                return
            except OSError as err:
                otherwise(OpeningError(ErrorCode.EAGAIN, err.strerror or str(err)))
                return
            then(files.found, files.take())

    def _answered(self, opener: _Opener, received: Received[OpenerToParent]) -> None:
        with received.fds as fds:
            if opener.otherwise is None:
                return
            match received.message:
                case FilesOpened(files=files, kept=kept) if _are_there(received.message, fds):
                    opener.otherwise = None
                    parcels = fds.take_all()
                    for place in reversed(kept):
                        self.keep(opener.uid, os.dup(parcels[place]), parcels.pop())
                    opener.then(list(files), parcels)
                case OpeningFailed(code=code, message=message):
                    self._fail(opener, code, message)
                case _:
                    self._fail(opener, ErrorCode.EAGAIN, "the daemon has no descriptors left")

    @staticmethod
    def _fail(opener: _Opener, code: ErrorCode, message: str) -> None:
        otherwise, opener.otherwise = opener.otherwise, None
        if otherwise:
            otherwise(OpeningError(code, message))

    def _kill(self, pid: int) -> None:
        opener = self._openers[pid]
        log.warning("opener for uid %d: not done in %d s: killed", opener.uid, TIME_LIMIT_S)
        with suppress(ProcessLookupError):
            kill_as(pid, (opener.uid,))
        self._fail(opener, ErrorCode.EIO, f"the files could not be opened in {TIME_LIMIT_S} s")

    def ended(self, pid: int) -> None:
        """Forget a process that has been reaped, if it was one of these."""
        opener = self._openers.pop(pid, None)
        if opener is None:
            return
        if opener.timer:
            opener.timer.cancel()
        # Its last messages may be unread yet.
        self._loop.call_soon(lambda: self._drained(opener))

    def _drained(self, opener: _Opener) -> None:
        with suppress(BlockingIOError, ChannelError):
            if opener.otherwise:
                self._answered(opener, opener.channel.receive())
        opener.channel.close()
        self._fail(opener, ErrorCode.EIO, "the process that opens the files has ended")

    def close(self) -> None:
        """Kill all; others reap them, if the kernel lets them end."""
        for pid, opener in self._openers.items():
            opener.otherwise = None
            opener.channel.close()
            with suppress(ProcessLookupError):
                kill_as(pid, (opener.uid,))


def _are_there(opened: FilesOpened, fds: Fds) -> bool:
    """Tell whether all descriptors that an opener speaks of have come."""
    named = [*opened.kept, *(index for file in opened.files for index in file.chain)]
    count = len(fds) - len(opened.kept)
    return not fds.are_lost and all(0 <= index < count for index in named)
