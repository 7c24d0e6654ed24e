"""The parent's side of shared directories: a process for each share of a VM that runs.

One ends when the VM's process does; a kernel that waits for a file system may delay that, so it is
killed when the VM is gone: what a guest was told to be written, the kernel has. One that ends
earlier takes its VM along, whose guest would wait for ever.
"""

import os
import socket
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from typing import NamedTuple

from vmd.config.shares import ShareOption
from vmd.confine.sandbox import kill_as
from vmd.shared.privsep import Plan, spawn
from vmd.shared.shares import ShareOrder
from vmm_kvm.log import Log

log = Log(__name__)


class _Process(NamedTuple):
    vm_id: int
    name: str
    """For messages."""
    uid: int
    """Of the process, if root's daemon made it."""


class Shares:
    """All processes of shares, on the event loop's thread."""

    def __init__(self, plan: Callable[[ShareOrder], Plan]) -> None:
        """Begin without any; `plan` returns how to make one."""
        self._plan = plan
        self._processes: dict[int, _Process] = {}
        self._released: set[int] = set()
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
            OSError: the host has no processes or descriptors left.
        """
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
            self._released.discard(pid)
            self.gone()
        elif status:
            how = f"was killed by signal {-status}" if status < 0 else f"failed, status {status}"
            self.crashed(process.vm_id, f"{process.name}: its process {how}")

    def release(self, vm_id: int) -> None:
        """End the processes of a VM that is gone."""
        for pid, process in self._processes.items():
            if process.vm_id == vm_id and pid not in self._released:
                self._released.add(pid)
                with suppress(ProcessLookupError):
                    kill_as(pid, (process.uid,))

    def close(self) -> None:
        """End all; others reap them."""
        for process in tuple(self._processes.values()):
            self.release(process.vm_id)
