"""Forking a sibling: a process whose parent is our parent, across pid namespaces.

An orphaned process becomes a child of the first process of its pid namespace, never of a subreaper
outside. So a process that forks in a namespace of its own, for a parent outside, has to make the
parent's children directly: by CLONE_PARENT, which fork(3) does not have.

Source: clone(2), pid_namespaces(7)
"""

import ctypes
import os
import signal

from vmd.confine.syscalls import SYSCALLS

CLONE_PARENT = 0x8000
CLONE_NEWPID = 0x2000_0000

_LIBC = ctypes.PyDLL(None, use_errno=True)  # the interpreter's lock stays ours
_LIBC.syscall.restype = ctypes.c_long


def fork_sibling() -> int:
    """Fork a process that is our parent's child; returns its pid here, and 0 in it.

    As os.fork does, but neither the C library nor the interpreter is told. The library keeps the
    number of the forking thread for the child's first one, which another thread could not signal by
    pthread_kill(3). Handlers of both do not run: they renew locks, which are all free where there
    is one thread, and would write to forty pages that the child otherwise shares with us. The
    module `random` would have to be told: it may not be loaded.

    Only for a process with one thread, which is not the first of a namespace.

    Raises:
        OSError: the host has no processes left.
    """
    pid = int(_LIBC.syscall(SYSCALLS["clone"], CLONE_PARENT | signal.SIGCHLD, None, None, None, 0))
    if pid < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return pid
