"""The uids of VMs, each until no process has it any more."""

from collections import Counter, deque
from collections.abc import Iterable


class UidPool:
    """The uids of VMs; without any, all processes keep the zygote's user, which is 0 here."""

    def __init__(self, uids: Iterable[int]) -> None:
        """Begin with all of `uids` free."""
        self._unused = iter(uids)
        first = next(self._unused, 0)
        self._is_separate = first != 0
        self._free = deque([first] if first else [])
        self._owned: set[int] = set()
        self._pids: dict[int, int] = {}
        self._counts = Counter[int]()

    def take(self) -> int | None:
        """Return a uid that no process has, reserved until `release`; None if none is free.

        A used one is given out again as late as possible.
        """
        if not self._is_separate:
            return 0
        if (unused := next(self._unused, None)) is not None:
            self._free.appendleft(unused)
        if not self._free:
            return None
        uid = self._free.popleft()
        self._owned.add(uid)
        return uid

    def release(self, uid: int) -> None:
        """Release a uid as soon as the last of its processes is reaped."""
        self._owned.discard(uid)
        self._look_if_free(uid)

    def started(self, pid: int, uid: int) -> None:
        """Take note of a process, until `ended`."""
        self._pids[pid] = uid
        self._counts[uid] += 1

    def ended(self, pid: int) -> None:
        """Note that a process was reaped; an unknown one is ignored."""
        uid = self._pids.pop(pid, None)
        if uid is not None:
            self._counts[uid] -= 1
            self._look_if_free(uid)

    def __contains__(self, pid: int) -> bool:
        """Tell whether a process has started and not ended."""
        return pid in self._pids

    def uid_of(self, pid: int) -> int:
        """Return the uid of a process that has started and not ended."""
        return self._pids.get(pid, 0)

    def _look_if_free(self, uid: int) -> None:
        if uid and uid not in self._owned and not self._counts[uid] and uid not in self._free:
            del self._counts[uid]
            self._free.append(uid)
