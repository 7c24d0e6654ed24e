"""Clones by fork: a second machine that continues from a paused one, in a child process.

The kernel copies RAM as it is written to, by either side, and with it every Python object: buses,
devices, routes. Resources that a fork cannot copy are replaced under their old numbers or
addresses: the VM and its vCPUs, which KVM refuses to other processes than their maker's, and event
descriptors, which would join the two machines. The source needs to be paused only for the fork.

A clone has the source's memory, hence its secrets and its next random numbers: its guest has to be
told.
"""

import gc
import os
import select
import warnings
from collections.abc import Iterator

from vmm_kvm.arch.x86.kvm_state import ClockPolicy
from vmm_kvm.errors import SpecError
from vmm_kvm.machine.machine import Machine

_INFO_MAX = 1 << 16
_EVENTFD, _EPOLL = "anon_inode:[eventfd]", "anon_inode:[eventpoll]"


def fork(machine: Machine, policy: ClockPolicy = ClockPolicy.FROZEN) -> int:
    """Fork this process; return the child's number, and 0 in the child, which has a clone.

    `machine` is paused, and all threads of this process but its vCPUs' and the calling one are
    ones that the child can do without. In both processes it stands paused afterwards: the parent
    calls `resume`, the child `start`, then `resume`. The child shares the parent's open files;
    after an error its caller ends it, by `os._exit`.

    Raises:
        SpecError: the machine's memory or disks are shared with other processes.
        RefusedError: it is not paused.
        KvmError, OSError: KVM or the host refused, in either process.
    """
    check(machine)
    record = machine.save_kvm()
    pid = _fork()
    if pid == 0:
        gc.freeze()  # a collection would write to, and so copy, all of the parent's objects
        renew_events()
        machine.adopt_fork(record, policy)
    return pid


def check(machine: Machine) -> None:
    """Refuse a machine that a fork cannot clone.

    Raises:
        SpecError: its memory or disks are shared with other processes.
    """
    if machine.memory.fd >= 0:
        raise SpecError("a clone needs memory that no other process has")
    if machine.spec.variables is not None and machine.spec.variables.is_kept:
        raise SpecError("a clone needs UEFI variables of its own")
    for spec in machine.spec.devices:
        match spec.kind:
            case "net":
                raise SpecError(f"{spec.name}: a clone needs an interface of its own")
            case "pmem" if spec.image.is_private:
                pass
            case "blk" if spec.image.is_read_only:
                pass
            case "blk" | "remote-blk" | "pmem":
                raise SpecError(f"{spec.name}: a clone needs a disk of its own")
            case _:
                pass


def _fork() -> int:
    with warnings.catch_warnings():
        # From 3.12 on Python warns of threads that the child lacks: the machine makes new ones.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def renew_events() -> None:
    """Replace every eventfd and epoll of a forked child by one of its own, with the same contents.

    Raises:
        OSError: the host has no descriptors left.
    """
    fds = list(_anonymous_fds())
    for fd in (fd for fd, kind in fds if kind == _EVENTFD):
        flags = os.EFD_CLOEXEC | (0 if os.get_blocking(fd) else os.EFD_NONBLOCK)
        new = os.eventfd(_count(fd), flags)
        os.dup2(new, fd, inheritable=False)
        os.close(new)
    watched = [(fd, list(_watched(fd))) for fd, kind in fds if kind == _EPOLL]
    for fd, _targets in watched:
        with select.epoll() as poll:
            os.dup2(poll.fileno(), fd, inheritable=False)
    for fd, targets in watched:  # among which are others of them
        with select.epoll.fromfd(os.dup(fd)) as poll:
            for target, events in targets:
                poll.register(target, events)


# Without pathlib, which would double the time of a clone's start.
_FDS, _INFOS = "/proc/self/fd", "/proc/self/fdinfo"


def _anonymous_fds() -> Iterator[tuple[int, str]]:
    for name in os.listdir(_FDS):  # noqa: PTH208 - see above
        try:
            kind = os.readlink(f"{_FDS}/{name}")  # noqa: PTH115 - see above
        except FileNotFoundError:  # the directory's own
            continue
        if kind in {_EVENTFD, _EPOLL}:
            yield int(name), kind


def _info(fd: int) -> list[list[str]]:
    """Return the lines of a descriptor's fdinfo, as words. Source: proc(5)."""
    file = os.open(f"{_INFOS}/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [line.split() for line in os.read(file, _INFO_MAX).decode("ascii").splitlines()]
    finally:
        os.close(file)


def _count(fd: int) -> int:
    return next(int(words[1], 16) for words in _info(fd) if words[0] == "eventfd-count:")


def _watched(fd: int) -> Iterator[tuple[int, int]]:
    for words in _info(fd):
        if words[0] == "tfd:":
            yield int(words[1]), int(words[3], 16)
