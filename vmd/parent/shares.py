"""The parent's side of shared directories: a process for each share of a VM that runs.

One ends when the VM's process does; a kernel that waits for a file system may delay that, so it is
killed when the VM is gone: what a guest was told to be written, the kernel has. One that ends
earlier takes its VM along, whose guest would wait for ever.
"""

import os
import socket
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from typing import NamedTuple

from vmd.config.shares import ShareOption
from vmd.confine.sandbox import kill_as
from vmd.parent.errors import ResourceError
from vmd.shared.privsep import Plan, spawn
from vmd.shared.shares import ShareOrder
from vmd.wire.messages import ErrorCode
from vmm_kvm.log import Log

log = Log(__name__)

HELD_MAX = 8
"""Processes of an ordinary user that were killed and do not end; with more, there are no others."""
HELD_S = 10.0
"""How long a process may take to end that was killed."""


class _Process(NamedTuple):
    vm_id: int
    name: str
    """For messages."""
    uid: int
    """Of the process, if root's daemon made it."""


class Shares:
    """All processes of shares, on the event loop's thread."""

    def __init__(self, plan: Callable[[ShareOrder], Plan], *, held_s: float = HELD_S) -> None:
        """Begin without any; `plan` returns how to make one."""
        self._plan = plan
        self._held_s = held_s
        self._processes: dict[int, _Process] = {}
        self._released: dict[int, float] = {}  # those that were killed, and when
        self.crashed: Callable[[int, str], None] = lambda _vm_id, _why: None
        """Called with the id of a VM that has lost one, and what has happened."""
        self.gone: Callable[[], None] = lambda: None
        """Called when the process of a VM that is gone has been reaped."""

    @property
    def pids(self) -> Collection[int]:
        """Those that have not been reaped."""
        return self._processes.keys()

    def start(
        self,
        vm_id: int,
        vm: str,
        option: ShareOption,
        uid: int,
        *,
        directory: int | None = None,
        cgroup: int | None = None,
    ) -> tuple[int, int]:
        """Start a process for a share; returns its connection and its status, the caller's.

        Args:
            vm_id: the VM's number.
            vm: its name.
            option: the share.
            uid: with whose rights.
            directory: a client's, or a parcel with it; the caller's, as `cgroup`.
            cgroup: for joining a control group.

        Raises:
            ResourceError: the kernel does not let earlier ones of this user end, since a file
                system of the user's does not answer.
            OSError: the host has no processes or descriptors left.
        """
        if uid and self._held(uid) > HELD_MAX:
            text = f"share {option.path}: file systems hold up too many processes of your shares"
            raise ResourceError(ErrorCode.EAGAIN, text)
        with ExitStack() as stack:
            ours, theirs = map(stack.enter_context, socket.socketpair())
            read_fd, write_fd = os.pipe()
            stack.callback(os.close, write_fd)
            order = ShareOrder(vm, option, uid, theirs.fileno(), write_fd, directory, cgroup)
            try:
                child = spawn(self._plan(order))
            except OSError:
                os.close(read_fd)
                raise
            child.connection.close()
            self._processes[child.pid] = _Process(vm_id, f"share {option.tag}", uid)
            return ours.detach(), read_fd

    def ended(self, pid: int, status: int) -> None:
        """Account for a process that has been reaped, if it was one of these."""
        process = self._processes.pop(pid, None)
        if process is None:
            return
        if pid in self._released:
            del self._released[pid]
            self.gone()
        elif status:
            how = f"was killed by signal {-status}" if status < 0 else f"failed, status {status}"
            self.crashed(process.vm_id, f"{process.name}: its process {how}")

    def release(self, vm_id: int) -> None:
        """End the processes of a VM that is gone."""
        for pid, process in self._processes.items():
            if process.vm_id == vm_id and pid not in self._released:
                self._released[pid] = time.monotonic()
                with suppress(ProcessLookupError):
                    kill_as(pid, (process.uid,))

    def _held(self, uid: int) -> int:
        """Return how many processes of a user were killed some time ago, and have not ended."""
        since = time.monotonic() - self._held_s
        return sum(
            at < since and self._processes[pid].uid == uid for pid, at in self._released.items()
        )

    def close(self) -> None:
        """End all; others reap them."""
        for process in tuple(self._processes.values()):
            self.release(process.vm_id)
