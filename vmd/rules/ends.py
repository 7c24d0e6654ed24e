"""Records of VMs: the log lines of each, and the ends of forgotten ones.

Everything is bounded, and records of one user's VMs do not displace those of others. They are kept
as long as the daemon lives.
"""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from vmd.config.model import Owner
from vmd.wire.messages import Lines, LogLine, VmInfo

LINES_KEPT = 64
"""Lines of the log of each VM."""
LINE_MAX = 300
"""Characters of one; with LINES_KEPT of them an answer still fits into a packet."""
GONE_MAX = 256
"""Forgotten VMs whose end is known."""
GONE_PER_USER = 32
"""Of those, the ones that one user has made."""


class History:
    """The log lines of one VM."""

    def __init__(self) -> None:
        """Begin without a line."""
        self._lines: deque[LogLine] = deque(maxlen=LINES_KEPT)
        self._count = 0

    def add(self, at: float, text: str) -> None:
        """Add a line; `at` is in seconds since 1970-01-01 UTC."""
        self._lines.append(LogLine(at=at, text=text[:LINE_MAX]))
        self._count += 1

    def answer(self, serial: int, position: int) -> Lines:
        """Return the lines behind the first `position`, as far as they are kept."""
        new = min(max(0, self._count - position), len(self._lines))
        lines = tuple(self._lines)[len(self._lines) - new :]
        return Lines(serial=serial, lines=lines, position=self._count)


class Gone(NamedTuple):
    """A VM that is forgotten."""

    info: VmInfo
    owner: Owner
    requester: int
    """The user who had it made."""
    history: History


class GoneVms:
    """VMs that have ended and are forgotten, latest first."""

    def __init__(self) -> None:
        """Begin without any."""
        self._gone: list[Gone] = []

    def add(self, gone: Gone) -> None:
        """Remember a VM, dropping the oldest of its user's, or of all."""
        self._gone.insert(0, gone)
        own = [one for one in self._gone if one.requester == gone.requester]
        if len(own) > GONE_PER_USER:
            self._gone.remove(own[-1])
        del self._gone[GONE_MAX:]

    def take(self, name: str, requester: int) -> Gone | None:
        """Return the latest of this name and user, which exists again; forget the others."""
        found = [one for one in self._gone if one.info.name == name and one.requester == requester]
        self._gone = [one for one in self._gone if one not in found]
        return found[0] if found else None

    def find(self, vm_id: int, name: str) -> Gone | None:
        """Return the latest of this id, or of this name where the id is 0."""
        return next(iter(self._matching(vm_id, name)), None)

    def infos(self, vm_id: int, name: str) -> tuple[VmInfo, ...]:
        """Return those of an id or a name, or all where neither is given."""
        return tuple(one.info for one in self._matching(vm_id, name))

    def _matching(self, vm_id: int, name: str) -> Iterable[Gone]:
        if not (vm_id or name):
            return self._gone
        return [
            one for one in self._gone if (one.info.id == vm_id if vm_id else one.info.name == name)
        ]
