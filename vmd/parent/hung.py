"""Ending processes of VMs whose zygote hangs: the parent kills them, asked by vmm.

vmm is believed nothing: with it taken over, no process but those of this daemon's VMs may be
killed. So a child of the parent becomes the VM's user, whom the kernel lets signal that VM's
processes alone; where all have one user, the parent looks whose child the process is.

Source: kill(2), pidfd_open(2); proc(5), "fdinfo" and "stat"
"""

import os
import re
import signal
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from vmd.confine.uids import Uids
from vmm_kvm.log import Log

log = Log(__name__)

_PARENT_FIELD = 1  # of what follows the name


def end_hung(pidfd: int, uid: int, uids: Uids | None, vmms: Collection[int]) -> int:
    """Kill the process of a pidfd, if it is one of a VM's.

    `uid` is the VM's if VMs have users of `uids`; `vmms` has the pids of vmm. Returns the pid of a
    child that does it, which exits with 0 if it could; 0 if there is none.
    """
    try:
        if uids is None:
            if _parent(pidfd) in vmms:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                return 0
        elif uid in uids.vms:
            return _kill_as(uid, pidfd)
    except ProcessLookupError:
        return 0  # it has ended
    except OSError as err:
        log.warning("vmm: a process cannot be killed: %s", err.strerror)
        return 0
    log.warning("vmm: asks for the end of a process that is no VM's")
    return 0


def _kill_as(uid: int, pidfd: int) -> int:
    # Not this process with another effective user: root, its real one, may signal root's processes.
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setresuid(uid, uid, uid)
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            status = 0
        finally:
            os._exit(status)
    return pid


def _parent(pidfd: int) -> int:
    """Return the pid of a process's parent; 0 if there is none."""
    told = Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii")
    found = re.search(r"^Pid:\s+(\d+)$", told, re.MULTILINE)
    if not found:
        return 0
    status = Path(f"/proc/{found[1]}/stat").read_text(encoding="utf-8", errors="replace")
    return int(status.rpartition(")")[2].split()[_PARENT_FIELD])
