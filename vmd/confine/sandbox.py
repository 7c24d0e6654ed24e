"""Dropping privileges that a process does not need, for good, before its first message.

The order is fixed, because each step needs what later ones take away: limits, namespaces, the
capability bounding set, the user, no_new_privs, Landlock, the system call filter. `confinements`
has a `Confinement` for each kind of process.

All of it binds the calling thread, so a process confines itself before it starts another.
"""

import ctypes
import errno
import os
import pwd
import resource
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from vmd.confine import landlock, namespaces, seccomp
from vmd.confine.seccomp import Denial, Filter
from vmd.confine.syscalls import SYSCALLS
from vmm_kvm.libc import LIBC

USER = "_vmd"
"""The user of processes without privileges, if root starts the daemon."""
_MAKE_USER = f"useradd --system --user-group --no-create-home --shell /usr/sbin/nologin {USER}"

TASKS_MAX = 256
"""Threads and processes of a uid that is one VM's: 64 vCPUs, its devices, and some to spare."""
NO_GROUP = 65534
"""The group of a user without one. Source: Linux include/linux/highuid.h, DEFAULT_OVERFLOWGID"""

_PR_SET_PDEATHSIG = 1
_PR_GET_PDEATHSIG = 2
_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_PR_SET_NAME = 15
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_MEMORY_MERGE = 67
_CAP_LAST_MAX = 63
_CAPABILITY_VERSION_3 = 0x20080522


class SandboxError(Exception):
    """A process cannot be confined, so it must not run; the message is one line."""


class Identity(NamedTuple):
    """A user, and the groups that a process of it has."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    """Besides `gid`."""


class Confinement(NamedTuple):
    """The confinement of one kind of process."""

    filter: Filter
    limits: tuple[tuple[int, int], ...] = ()
    """Pairs of a RLIMIT_ constant and the value, which is soft and hard limit."""
    capabilities: frozenset[int] = frozenset()
    """Capabilities that a process of root keeps when it becomes one of `_vmd`."""
    is_isolated: bool = True
    """Whether a process of root moves into empty namespaces."""
    opens_files: bool = False
    """Whether it may open any files that exist, as far as its user may."""
    writable: tuple[str, ...] = ()
    """Directories below which it may open files, to read and write them; in no other."""


class _CapHeader(ctypes.Structure):
    """struct __user_cap_header_struct."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    """struct __user_cap_data_struct."""

    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def find_identity() -> Identity:
    """Return the user of processes without privileges.

    Raises:
        SandboxError: there is no such user.
    """
    try:
        entry = pwd.getpwnam(USER)
    except KeyError:
        raise SandboxError(f"unknown user {USER} (make it: {_MAKE_USER})") from None
    return Identity(entry.pw_uid, entry.pw_gid)


def client_identity(uid: int) -> Identity:
    """Return the identity that gives a process a user's rights; an unknown user is in no group.

    May take long where users are looked up over the network.
    """
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return Identity(uid, NO_GROUP)
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    return Identity(uid, user.pw_gid, tuple(groups))


def confine(
    confinement: Confinement,
    identity: Identity | None,
    subtree: landlock.Subtree | None = None,
) -> None:
    """Confine this process to `confinement`.

    `identity` is None if an ordinary user runs the daemon: user, namespaces and capabilities then
    stay as they are, and the rest is the same. Below `subtree` it may use files.

    Raises:
        SandboxError: a step failed; the process must end.
    """
    try:
        for limit, value in confinement.limits:
            # An ordinary user's limit may be lower already.
            hard = resource.getrlimit(limit)[1]
            if hard != resource.RLIM_INFINITY:
                value = min(value, hard)  # noqa: PLW2901 - as said
            resource.setrlimit(limit, (value, value))
        if identity is not None:
            if confinement.is_isolated:
                namespaces.leave_everything()
            _change_user(identity, confinement.capabilities)
        # A change of user resets both: no process may trace us, and we do not outlive our parent.
        _prctl(_PR_SET_DUMPABLE, 0)
        seccomp.no_new_privileges()
        landlock.restrict(
            confinement.writable, opens_files=confinement.opens_files, subtree=subtree
        )
        seccomp.install(seccomp.compile_filter(confinement.filter))
    except OSError as err:
        raise SandboxError(err.strerror or str(err)) from err


def _change_user(identity: Identity, kept: frozenset[int]) -> None:
    _drop_bounding_set(frozenset())  # what is executed has none
    _prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)
    _prctl(_PR_SET_KEEPCAPS, 0)
    _keep_capabilities(kept)


def confine_executing(
    identity: Identity | None, kept: frozenset[int], denials: Iterable[Denial]
) -> None:
    """Confine this process, which executes programs: some capabilities are kept, calls denied.

    `identity` is None if an ordinary user runs the daemon; user and capabilities then stay.

    Raises:
        SandboxError: a step failed; the process must end.
    """
    try:
        if identity is not None:
            _change_user(identity, kept)
        _prctl(_PR_SET_DUMPABLE, 0)
    except OSError as err:
        raise SandboxError(err.strerror or str(err)) from err
    deny(denials)


def become(uid: int) -> None:
    """In a process that the zygote has forked, become the user and group `uid` for good.

    No capability is left, and no more than `TASKS_MAX` threads and processes can be there of it.

    Raises:
        SandboxError: a step failed; the process must end.
    """
    try:
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        _keep_capabilities(frozenset())
        resource.setrlimit(resource.RLIMIT_NPROC, (TASKS_MAX, TASKS_MAX))
    except OSError as err:
        raise SandboxError(err.strerror or str(err)) from err


@contextmanager
def owning(uid: int, gid: int) -> Iterator[None]:
    """In the parent of root's daemon, let new files belong to a user and a group.

    Files of the user may be given to the group, too. All capabilities stay. CAP_CHOWN is not
    needed.

    Raises:
        OSError: the kernel refused.

    Source: setfsuid(2), capabilities(7) "Effect of user ID changes on capabilities"
    """
    with _still_dying_with_parent():
        try:
            # They report no errors: the second call of each only asks.
            LIBC.setfsgid(gid)
            LIBC.setfsuid(uid)
            if (LIBC.setfsuid(-1), LIBC.setfsgid(-1)) != (uid, gid):
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            _keep_capabilities(held_capabilities())
            yield
        finally:
            LIBC.setfsuid(os.geteuid())
            LIBC.setfsgid(os.getegid())


def kill_as(pid: int, users: Iterable[int]) -> None:
    """In the parent of root's daemon, kill a child that has one of `users`, if not its own user.

    CAP_KILL is not needed.

    Raises:
        ProcessLookupError: there is no such process.
        PermissionError: it is another user's.
    """
    with suppress(PermissionError):
        os.kill(pid, signal.SIGKILL)
        return
    for uid in users:
        with acting_as(uid), suppress(PermissionError):
            os.kill(pid, signal.SIGKILL)
            return
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Gain the right to signal a user's processes.

    The kernel checks the effective user of the process that signals, and the real and the saved
    one of the process that is signalled: so that user gets no rights over us.

    Source: kill(2), ptrace(2)
    """
    own = os.getuid()
    with _still_dying_with_parent():
        os.setresuid(own, uid, own)
        try:
            yield
        finally:
            os.setresuid(own, own, own)
            _prctl(_PR_SET_DUMPABLE, 0)


@contextmanager
def _still_dying_with_parent() -> Iterator[None]:
    """Keep the signal that the end of our parent has sent: changes of users forget it.

    Whoever has started us has asked for one, or we by `die_with`. It comes afterwards if the
    parent ends meanwhile.

    Source: prctl(2), PR_SET_PDEATHSIG
    """
    wanted = ctypes.c_int()
    if LIBC.prctl(_PR_GET_PDEATHSIG, ctypes.addressof(wanted), 0, 0, 0):
        wanted.value = 0
    parent = os.getppid()
    try:
        yield
    finally:
        if wanted.value:
            _prctl(_PR_SET_PDEATHSIG, wanted.value)
            if os.getppid() != parent:
                os.kill(os.getpid(), wanted.value)


def deny(denials: Iterable[Denial]) -> None:
    """Make the calls in `denials` fail in this process and all that it starts.

    Raises:
        SandboxError: the kernel refused.
    """
    try:
        seccomp.install(seccomp.compile_denials(denials))
    except OSError as err:
        raise SandboxError(err.strerror or str(err)) from err


def keep_capabilities(kept: frozenset[int]) -> None:
    """In a process of root, drop every capability but `kept`; executing a program restores none.

    Capabilities that a container or a service manager has taken away stay away.

    Raises:
        SandboxError: the kernel refused.
    """
    try:
        _drop_bounding_set(kept)
        _keep_capabilities(kept & held_capabilities())
        seccomp.no_new_privileges()
    except OSError as err:
        raise SandboxError(err.strerror or str(err)) from err


def held_capabilities() -> frozenset[int]:
    """Return what this thread may have."""
    header = _CapHeader(_CAPABILITY_VERSION_3, 0)
    data = (_CapData * 2)()
    if LIBC.syscall(SYSCALLS["capget"], ctypes.byref(header), ctypes.byref(data)):
        number = ctypes.get_errno()
        raise OSError(number, f"capget: {os.strerror(number)}")
    return frozenset(
        capability
        for capability in range(_CAP_LAST_MAX + 1)
        if data[capability // 32].permitted >> capability % 32 & 1
    )


def die_with(parent: int) -> None:
    """Let the kernel kill us when `parent`, which forked us, ends; end now if it has already.

    A change of user forgets this, so it is called again after one.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the subreaper: processes below us whose parent has ended become our children.

    Source: prctl(2), PR_SET_CHILD_SUBREAPER.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def merge_memory() -> bool:
    """Let the host merge equal pages of private memory of this process and its children.

    It does so only if its administrator has turned that on (/sys/kernel/mm/ksm/run). Returns
    whether the kernel has agreed: Linux 6.4 and newer do, some for root alone.

    Source: Linux Documentation/admin-guide/mm/ksm.rst; prctl(2), PR_SET_MEMORY_MERGE
    """
    try:
        _prctl(_PR_SET_MEMORY_MERGE, 1)
    except OSError:
        return False
    return True


def set_title(title: str) -> None:
    """Name this process in process lists; the kernel keeps 15 bytes."""
    name = ctypes.create_string_buffer(title.encode()[:15])
    _prctl(_PR_SET_NAME, ctypes.addressof(name))


def _prctl(option: int, argument: int) -> None:
    if LIBC.prctl(option, argument, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl: {os.strerror(number)}")


def _drop_bounding_set(kept: frozenset[int]) -> None:
    for capability in range(_CAP_LAST_MAX + 1):
        if capability in kept or not LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            continue
        number = ctypes.get_errno()
        if number == errno.EINVAL:  # unknown to this kernel, as are all above it
            return
        raise OSError(number, f"prctl: {os.strerror(number)}")


def _keep_capabilities(kept: frozenset[int]) -> None:
    header = _CapHeader(_CAPABILITY_VERSION_3, 0)
    data = (_CapData * 2)()
    for capability in kept:
        word, bit = divmod(capability, 32)
        data[word].effective |= 1 << bit
        data[word].permitted |= 1 << bit
    if LIBC.syscall(SYSCALLS["capset"], ctypes.byref(header), ctypes.byref(data)):
        number = ctypes.get_errno()
        raise OSError(number, f"capset: {os.strerror(number)}")
