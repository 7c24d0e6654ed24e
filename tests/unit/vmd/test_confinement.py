"""Rights of a confined process: each kind, in a child of its own."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import os
import resource
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from vmd.confine import landlock
from vmd.confine.confinements import (
    CONFINEMENTS,
    PARENT_CAPABILITIES,
    PARENT_DENIALS,
    TPM_DENIALS,
    Kind,
    encrypted_vm_confinement,
    share_confinement,
    zygote_confinement,
)
from vmd.confine.sandbox import (
    TASKS_MAX,
    Confinement,
    Identity,
    SandboxError,
    acting_as,
    become,
    confine,
    deny,
    die_with,
    find_identity,
    keep_capabilities,
    kill_as,
    owning,
    set_title,
)
from vmd.confine.seccomp import Allow, Argument, Filter, Refuse, compile_filter, install
from vmd.confine.syscalls import SYSCALLS
from vmd.confine.uids import UidRange, Uids
from vmm_kvm.kvm.abi import KVMIO
from vmm_kvm.kvm.ioctl import OPERATIONS
from vmm_kvm.kvm.sev_abi import KVM_MEMORY_ENCRYPT_OP, KVM_MEMORY_ENCRYPT_REG_REGION

KINDS: list[Kind] = [
    kind for kind in Kind if kind is not Kind.TPM
]  # it executes a program of others
# Calls that no process needs.
FORBIDDEN = (
    *("execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev"),
    *("mount", "umount2", "pivot_root", "unshare", "setns", "chroot", "reboot"),
    *("setuid", "setresuid", "setgroups", "capset", "keyctl", "bpf", "personality"),
    *("connect", "listen", "unlink", "rename", "mkdirat", "truncate", "chmod", "chown"),
    *("pidfd_getfd", "openat2"),
    *("kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "perf_event_open", "userfaultfd"),
)
# The local process asks the host's DNS server, the opener and shares open files.
EXEMPT = {Kind.LOCAL: {"connect"}, Kind.OPENER: {"openat2"}, Kind.SHARE: {"openat2"}}
# Calls that some kinds may make and others may not.
OF_FEW = {
    "fork": {Kind.ZYGOTE},
    "seccomp": {Kind.ZYGOTE},
    "pidfd_send_signal": {Kind.ZYGOTE},
    "pidfd_open": {Kind.VMM},
    "wait4": {Kind.VMM, Kind.ZYGOTE},
    "socketpair": {Kind.VMM, Kind.ZYGOTE},
}

_LANDLOCK = landlock.version()
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(name: str, *arguments: int) -> int:
    """Make a system call with numbers for arguments; returns its result, or minus the errno."""
    padded = [ctypes.c_long(value) for value in (*arguments, *[0] * (6 - len(arguments)))]
    result = int(_libc.syscall(SYSCALLS[name], *padded))
    return -ctypes.get_errno() if result == -1 else result


def _calling(name: str) -> Callable[[], None]:
    def body() -> None:
        _call(name, -1, -1, -1)

    return body


def _end_of(body: Callable[[], None]) -> int:
    """Run `body` in a child; returns the child's end: an exit status, or minus a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        except BaseException as err:  # noqa: BLE001 - nothing may go up from here
            os.write(2, f"{type(err).__name__}: {err}\n".encode())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _confined(kind: Kind, body: Callable[[], None]) -> int:
    def child() -> None:
        confine(CONFINEMENTS[kind], None)
        body()

    return _end_of(child)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forbidden_call_ends_the_process(kind: Kind) -> None:
    """A call that no process needs ends a process of any kind."""
    survived = {
        name: status
        for name in FORBIDDEN
        if name not in EXEMPT.get(kind, set())
        and (status := _confined(kind, _calling(name))) != -signal.SIGSYS
    }
    assert survived == {}


@pytest.mark.parametrize("kind", KINDS)
def test_only_vmm_and_the_zygote_have_children(kind: Kind) -> None:
    """Only the zygote starts processes and ends them; vmm only waits for them."""
    for name, kinds in OF_FEW.items():
        if kind not in kinds:
            assert _confined(kind, _calling(name)) == -signal.SIGSYS, name


@pytest.mark.parametrize("kind", KINDS)
def test_sockets_are_for_networks_alone(kind: Kind) -> None:
    """No process makes sockets, except those that speak netlink, and DNS."""
    status = _confined(kind, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close())
    assert status == (0 if kind in {Kind.PRIV, Kind.LOCAL} else -signal.SIGSYS)
    status = _confined(kind, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close())
    assert status == (0 if kind is Kind.PRIV else -signal.SIGSYS)
    status = _confined(kind, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW).close())
    assert status != 0
    status = _confined(kind, lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).close())
    assert status == (0 if kind is Kind.PRIV else -signal.SIGSYS)


@pytest.mark.parametrize("kind", KINDS)
def test_files_cannot_be_opened(kind: Kind) -> None:
    """No process opens a file; it survives the attempt, which libraries make."""

    def body() -> None:
        try:
            os.open("/etc/passwd", os.O_RDONLY)
        except PermissionError:
            return
        raise AssertionError("it opened a file")

    assert _confined(kind, body) == 0


@pytest.mark.skipif(landlock.version() == 0, reason="this kernel has no Landlock")
def test_priv_opens_settings_of_the_network() -> None:
    """Below /proc/sys/net, priv reads and writes; other settings are closed to it."""

    def body() -> None:
        os.close(os.open("/proc/sys/net/ipv4/ip_forward", os.O_RDONLY))
        for path in ("/proc/sys/kernel/ostype", "/proc/self/status", "/etc/passwd"):
            with pytest.raises(PermissionError):
                os.open(path, os.O_RDONLY)
        with pytest.raises(PermissionError):
            os.open("/proc/sys/net/ipv4", os.O_RDONLY | os.O_DIRECTORY)

    assert _confined(Kind.PRIV, body) == 0


@pytest.mark.skipif(landlock.version() == 0, reason="this kernel has no Landlock")
def test_an_opener_opens_what_there_is(tmp_path: Path) -> None:
    """An opener opens existing files, to read, write and truncate; it makes and lists none.

    The system call filter cannot check this: openat2 has its flags in memory.
    """
    tmp_path.chmod(0o777)
    there = tmp_path / "there"
    there.write_bytes(b"contents")
    there.chmod(0o666)

    def tries(path: Path, flags: int) -> int:
        how = struct.pack("=QQQ", flags, 0o600 if flags & os.O_CREAT else 0, 0)
        held = ctypes.create_string_buffer(how, len(how))
        name = ctypes.create_string_buffer(os.fsencode(path))
        return _call("openat2", -100, ctypes.addressof(name), ctypes.addressof(held), len(how))

    def body() -> None:
        assert tries(there, os.O_RDWR) >= 0
        assert tries(there, os.O_PATH) >= 0
        assert tries(tmp_path, os.O_PATH) >= 0
        for path, flags in (
            (tmp_path / "new", os.O_RDWR | os.O_CREAT),
            (tmp_path, os.O_RDONLY | os.O_DIRECTORY),
        ):
            assert tries(path, flags) == -errno.EACCES, path

    assert _confined(Kind.OPENER, body) == 0
    assert list(tmp_path.iterdir()) == [there]


@pytest.mark.parametrize("kind", KINDS)
def test_memory_never_becomes_code(kind: Kind) -> None:
    """An executable mapping ends the process."""
    prot_exec, private_anonymous = 4, 0x22

    def body() -> None:
        _call("mmap", 0, 4096, prot_exec, private_anonymous, -1, 0)

    assert _confined(kind, body) == -signal.SIGSYS


@pytest.mark.parametrize("kind", KINDS)
def test_what_every_process_does_is_allowed(kind: Kind) -> None:
    """Memory, locks, the log, messages, clocks and a traceback are allowed to every kind."""

    def body() -> None:
        import time  # noqa: PLC0415 - loaded already
        import traceback  # noqa: PLC0415 - likewise

        data = bytearray(64 << 20)
        del data
        lock = threading.Lock()
        with lock:
            time.monotonic()
        os.urandom(16)
        ours.sendmsg([b"x"])
        assert theirs.recvmsg(1)[0] == b"x"
        try:
            int("a bug")
        except ValueError:
            traceback.format_exc()

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        assert _confined(kind, body) == 0


def test_a_vm_process_has_threads() -> None:
    """A vCPU is a thread, which a VM process may start, and a device process may not."""

    def body() -> None:
        threads = [threading.Thread(target=list) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert _confined(Kind.VM, body) == 0
    assert _confined(Kind.DISK, body) != 0


def test_only_an_encrypted_vm_speaks_to_the_firmware() -> None:
    """VM processes may use all of KVM but a launch's commands, which are for encrypted VMs."""
    requests = [number for number in OPERATIONS if number & 0xFF00 == KVMIO << 8]
    assert len(requests) > 60

    def refused_to(confinement: Confinement) -> int:
        def body() -> None:
            confine(confinement, None)
            refused = {one for one in requests if _call("ioctl", -1, one) == -errno.ENOTTY}
            expected = set() if confinement is not CONFINEMENTS[Kind.VM] else launch
            assert refused == expected

        launch = {KVM_MEMORY_ENCRYPT_OP, KVM_MEMORY_ENCRYPT_REG_REGION}
        assert launch < set(requests)
        return _end_of(body)

    assert refused_to(CONFINEMENTS[Kind.VM]) == 0
    assert refused_to(encrypted_vm_confinement()) == 0


@pytest.mark.parametrize("kind", [Kind.VM, Kind.DISK, Kind.NIC])
def test_blank_processes_name_themselves(kind: Kind) -> None:
    """A process that learns its role when it is confined shows that in process lists."""

    def body() -> None:
        with Path("/proc/self/comm").open() as comm:
            confine(CONFINEMENTS[kind], None)
            set_title("vm/alpine")
            assert comm.read() == "vm/alpine\n"

    assert _end_of(body) == 0


def _fork() -> None:
    _call("fork")


def test_the_zygote_starts_processes_that_are_confined_further() -> None:
    """The zygote forks; its children can give up more rights, and do."""

    def child_of_zygote() -> None:
        status = _confined(Kind.DISK, lambda: None)
        assert status == 0
        status = _confined(Kind.DISK, _fork)
        assert status == -signal.SIGSYS

    assert _confined(Kind.ZYGOTE, child_of_zygote) == 0


@pytest.mark.root
@pytest.mark.parametrize("kind", [Kind.CONTROL, Kind.VMM, Kind.LOCAL])
def test_root_becomes_nobody_in_particular(kind: Kind) -> None:
    """A process without privileges has another user, no groups, no files and no capabilities."""
    try:
        identity = find_identity()
    except SandboxError as err:
        pytest.skip(str(err))

    def body() -> None:
        with Path("/proc/self/status").open() as status:
            confine(CONFINEMENTS[kind], identity)
            lines = dict(line.split(":", 1) for line in status.read().splitlines())
        assert lines["Uid"].split() == [str(identity.uid)] * 4
        assert lines["Gid"].split() == [str(identity.gid)] * 4
        assert lines["Groups"].split() == []
        assert {lines[name].strip() for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}

    assert _end_of(body) == 0


@pytest.mark.root
def test_an_isolated_process_sees_nothing() -> None:
    """The root directory is empty and read-only, and the only interface is a dead loopback."""
    from vmd.confine.namespaces import leave_everything  # noqa: PLC0415 - for this test alone

    def body() -> None:
        leave_everything()
        assert list(Path("/").iterdir()) == []
        with pytest.raises(OSError, match="Read-only file system"):
            Path("/x").mkdir()
        assert [name for _, name in socket.if_nameindex()] == ["lo"]

    assert _end_of(body) == 0


@pytest.mark.root
def test_priv_keeps_one_capability() -> None:
    """The priv process is another user, with power over the network and its settings."""
    clone_newnet = 0x40000000

    def body() -> None:
        from vmd.confine.sandbox import Identity  # noqa: PLC0415 - for this test alone

        assert _call("unshare", clone_newnet) == 0
        with Path("/proc/self/status").open() as status:
            confine(CONFINEMENTS[Kind.PRIV], Identity(65534, 65534))
            lines = dict(line.split(":", 1) for line in status.read().splitlines())
        for value in ("1\n", "0\n"):
            with Path("/proc/sys/net/ipv4/ip_forward").open("r+") as setting:
                setting.write(value)
            assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == value
        assert lines["Uid"].split() == lines["Gid"].split() == ["65534"] * 4
        assert lines["Groups"].split() == []
        assert int(lines["CapEff"], 16) == int(lines["CapPrm"], 16) == 1 << 12
        assert int(lines["CapBnd"], 16) == 0
        assert lines["NoNewPrivs"].strip() == "1"
        assert lines["Seccomp"].strip() == "2"

    assert _end_of(body) == 0


UIDS = Uids(UidRange(0x7F000000, 0x1000), -1)
FIRST_VM, SECOND_VM = UIDS.vms[0], UIDS.vms[1]


def _as_zygote(body: Callable[[], None]) -> int:
    def child() -> None:
        confine(zygote_confinement(UIDS), Identity(UIDS.zygote, UIDS.zygote))
        body()

    return _end_of(child)


def test_the_zygote_makes_no_namespaces() -> None:
    """The zygote forks with its own flags, or the C library's; with any others it ends."""
    for flags in (0x02000000, 0x00020000, 0x10000000, 0x20000000, 0x40000000, 0x08000000):
        for others in (signal.SIGCHLD, signal.SIGCHLD | 0x8000):
            body = partial(_attack, "clone", [flags | others, 0])
            assert _confined(Kind.ZYGOTE, body) == -signal.SIGSYS, hex(flags)


@pytest.mark.root
def test_the_zygote_becomes_users_of_its_range_alone() -> None:
    """The zygote has two capabilities to change users; any number beyond the range ends it."""

    def look() -> None:
        with Path("/proc/self/status").open() as status:
            confine(zygote_confinement(UIDS), Identity(UIDS.zygote, UIDS.zygote))
            lines = dict(line.split(":", 1) for line in status.read().splitlines())
        assert lines["Uid"].split() == [str(UIDS.zygote)] * 4
        assert int(lines["CapEff"], 16) == int(lines["CapPrm"], 16) == 1 << 6 | 1 << 7
        assert int(lines["CapBnd"], 16) == 0

    assert _end_of(look) == 0
    assert _as_zygote(lambda: os.setresuid(FIRST_VM, FIRST_VM, FIRST_VM)) == 0
    last = UIDS.part.first + UIDS.part.size - 1
    for uid in (0, 1, 999, UIDS.part.first - 1, last + 1, (1 << 32) - 1):
        for ids in ((uid, last, last), (last, uid, last), (last, last, uid)):
            for name in ("setresuid", "setresgid"):
                assert _as_zygote(partial(_attack, name, list(ids))) == -signal.SIGSYS, (name, ids)


@pytest.mark.root
def test_a_user_of_the_range_is_one_for_good() -> None:
    """A user of the range has no capability to become another, and limited threads."""

    def body() -> None:
        become(FIRST_VM)
        assert os.getuid() == FIRST_VM
        for call in (os.setresuid, os.setresgid):
            with pytest.raises(PermissionError):
                call(SECOND_VM, SECOND_VM, SECOND_VM)
        done = threading.Event()
        threads = [threading.Thread(target=done.wait) for _ in range(TASKS_MAX + 1)]
        started = []
        for thread in threads:
            try:
                thread.start()
            except RuntimeError:
                break
            started.append(thread)
        done.set()
        for thread in started:
            thread.join()
        assert TASKS_MAX // 2 < len(started) < TASKS_MAX

    assert _as_zygote(body) == 0


def _wait_as(uid: int) -> int:
    """Return the pid of a process that has become a user, and waits."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        become(uid)
        os.write(write_fd, b"x")
        while True:
            signal.pause()
    os.read(read_fd, 1)
    os.close(read_fd)
    os.close(write_fd)
    return pid


@pytest.mark.root
def test_users_of_the_range_do_not_reach_each_other() -> None:
    """Even without filters, Landlock and namespaces, signals, traces and /proc are refused."""
    other, same = _wait_as(SECOND_VM), _wait_as(FIRST_VM)

    def body() -> None:
        become(FIRST_VM)
        for number in (0, signal.SIGKILL, signal.SIGSTOP):
            assert _call("kill", other, number) == -errno.EPERM
            assert _call("tgkill", other, other, number) == -errno.EPERM
        assert _call("kill", same, 0) == 0  # a process of the same user is allowed
        pidfd = os.pidfd_open(other)
        assert _call("pidfd_send_signal", pidfd, signal.SIGKILL, 0, 0) == -errno.EPERM
        assert _call("pidfd_getfd", pidfd, 0, 0) == -errno.EPERM
        assert _call("ptrace", 0x4206, other, 0, 0) == -errno.EPERM  # PTRACE_SEIZE
        for name in ("process_vm_readv", "process_vm_writev"):
            assert _call(name, other, 0, 0, 0, 0, 0) in {-errno.EPERM, 0}
        for name in ("mem", "environ", "maps", "fd", "fd/0", "map_files", f"task/{other}/mem"):
            with pytest.raises(PermissionError):
                os.close(os.open(f"/proc/{other}/{name}", os.O_RDONLY))

    try:
        assert _end_of(body) == 0
        assert os.waitpid(other, os.WNOHANG) == (0, 0)
    finally:
        for pid in (other, same):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.root
def test_files_of_others_without_cap_chown(tmp_path: Path) -> None:
    """The parent makes files of a user and a group, anywhere, and is root again afterwards."""

    def body() -> None:
        keep_capabilities(frozenset(PARENT_CAPABILITIES))
        (tmp_path / "own").touch()
        with pytest.raises(PermissionError):
            os.chown(tmp_path / "own", FIRST_VM, -1)
        with owning(FIRST_VM, SECOND_VM):
            (tmp_path / "theirs").touch()
            os.chown(tmp_path / "theirs", -1, SECOND_VM)
        status = (tmp_path / "theirs").stat()
        assert (status.st_uid, status.st_gid) == (FIRST_VM, SECOND_VM)
        (tmp_path / "after").touch()
        assert (tmp_path / "after").stat().st_uid == 0
        with owning(0, 0), pytest.raises(PermissionError):
            os.chown(tmp_path / "own", -1, SECOND_VM)

    assert _end_of(body) == 0


@pytest.mark.root
@pytest.mark.parametrize("act", [lambda: owning(FIRST_VM, SECOND_VM), lambda: acting_as(FIRST_VM)])
def test_acting_for_others_it_dies_with_its_parent(
    act: Callable[[], AbstractContextManager[None]],
) -> None:
    """The kernel forgets that with each change of users; it is told again."""
    alive, end = os.pipe()

    def child() -> None:
        parent, (ready, done) = os.getpid(), os.pipe()
        if os.fork() == 0:
            die_with(parent)
            with act():
                pass
            os.write(done, b"1")
            signal.alarm(30)
            signal.pause()
        os.read(ready, 1)

    assert _end_of(child) == 0
    os.close(end)
    assert select.select([alive], [], [], 20)[0], "it lives on"
    os.close(alive)


@pytest.mark.root
def test_ends_of_others_without_cap_kill() -> None:
    """The parent kills processes of the users that it names, and of no others."""
    victim, bystander = _wait_as(FIRST_VM), _wait_as(SECOND_VM)

    def body() -> None:
        keep_capabilities(frozenset(PARENT_CAPABILITIES))
        for users in ((), (FIRST_VM,)):
            with pytest.raises(PermissionError):
                kill_as(bystander, users)
        kill_as(victim, (SECOND_VM, FIRST_VM))
        assert os.geteuid() == 0

    try:
        assert _end_of(body) == 0
        assert os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]) == -signal.SIGKILL
        assert os.waitpid(bystander, os.WNOHANG) == (0, 0)
    finally:
        os.kill(bystander, signal.SIGKILL)
        os.waitpid(bystander, 0)


@pytest.mark.root
def test_the_zygote_ends_processes_of_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zygote acts as a user only to kill; it reaches no process outside its range."""
    # It would refuse a process that this test has not confined.
    monkeypatch.setattr(landlock, "version", lambda: 0)
    victim, bystander = _wait_as(FIRST_VM), _wait_as(SECOND_VM)
    pidfds = [os.pidfd_open(victim), os.pidfd_open(bystander), os.pidfd_open(os.getpid())]

    def body() -> None:
        with acting_as(FIRST_VM):
            for pidfd in pidfds[1:]:
                with pytest.raises(PermissionError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            signal.pidfd_send_signal(pidfds[0], signal.SIGKILL)
        assert os.getuid() == UIDS.zygote
        with pytest.raises(PermissionError):
            signal.pidfd_send_signal(pidfds[1], signal.SIGKILL)

    def child() -> None:
        confine(zygote_confinement(UIDS), Identity(UIDS.zygote, UIDS.zygote))
        faulthandler.disable()
        body()

    try:
        assert _end_of(child) == 0
        assert os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]) == -signal.SIGKILL
        assert os.waitpid(bystander, os.WNOHANG) == (0, 0)
    finally:
        os.kill(bystander, signal.SIGKILL)
        os.waitpid(bystander, 0)
        for pidfd in pidfds:
            os.close(pidfd)


def test_arguments_are_compared_under_their_mask() -> None:
    """A call with conditions is allowed if one of its cases fits as a whole, else it ends us."""
    table = Filter(
        (
            *(Allow(name, "the end") for name in ("exit_group", "write", "rt_sigprocmask")),
            Allow("getpriority", "a", (Argument(0, 1), Argument(1, 0x10, 0xF0))),
            Allow("getpriority", "b", (Argument(0, 7),)),
        ),
        (Refuse("getppid", errno.EPERM, "to see it refused"),),
    )
    program = compile_filter(table)

    def run(*arguments: int) -> int:
        def body() -> None:
            install(program)
            _call("getpriority", *arguments)
            os._exit(0)

        return _end_of(body)

    assert [run(1, 0x1F), run(1, 0x10), run(7, 0x20)] == [0, 0, 0]
    assert [run(1, 0x20), run(2, 0x10)] == [-signal.SIGSYS] * 2

    def refused() -> None:
        install(program)
        os._exit(3 if _call("getppid") == -errno.EPERM else 4)

    assert _end_of(refused) == 3


def test_each_allowance_has_a_reason() -> None:
    """Every allowed and every refused call has a reason."""
    for kind, confinement in CONFINEMENTS.items():
        table = confinement.filter
        reasons = [one.reason for one in table.allowed] + [one.reason for one in table.refused]
        assert min(map(len, reasons)) >= 3, kind


# Ways to reach another process: the call and its arguments; None stands for its number.
_ATTACKS: tuple[tuple[str, tuple[int | None, ...]], ...] = (
    *(("kill", (None, number)) for number in (0, 9, 19)),
    ("tkill", (None, 9)),
    *(("tgkill", (None, None, number)) for number in (0, 6, 9, 19, 34)),
    ("rt_sigqueueinfo", (None, 9, 0)),
    ("rt_tgsigqueueinfo", (None, None, 9, 0)),
    ("ptrace", (16, None, 0, 0)),
    ("process_vm_readv", (None, 0, 0, 0, 0, 0)),
    ("process_vm_writev", (None, 0, 0, 0, 0, 0)),
    ("fcntl", (0, 8, None)),  # F_SETOWN: SIGIO for another
    ("fcntl", (0, 10, 9)),  # F_SETSIG: another signal than SIGIO
    ("setpriority", (0, None, 19)),
    ("kcmp", (None, None, 0, 0, 0)),
)
# The zygote's filter binds the processes that it forks, which may do this to themselves.
_OF_THE_ZYGOTE = {("tgkill", 6), ("tgkill", 34)}


def _attack(name: str, numbers: list[int]) -> None:
    _call(name, *numbers)


@pytest.mark.parametrize("abi", [None, 1, 0], ids=["landlock", "landlock 1", "no landlock"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_other_process_can_be_reached(
    kind: Kind, abi: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process can signal, trace or read another, even on a kernel without Landlock."""
    if abi is not None:
        monkeypatch.setattr(landlock, "version", lambda: min(abi, _LANDLOCK))
    victim = os.fork()
    if victim == 0:
        while True:
            signal.pause()
    try:
        survived = []
        for name, arguments in _ATTACKS:
            if kind is Kind.ZYGOTE and (name, arguments[-1]) in _OF_THE_ZYGOTE:
                continue
            numbers = [victim if one is None else one for one in arguments]
            status = _confined(kind, partial(_attack, name, numbers))
            if status != -signal.SIGSYS:
                survived.append((name, arguments, status))
        assert survived == []
        assert os.waitpid(victim, os.WNOHANG) == (0, 0)
    finally:
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_may_abort(kind: Kind) -> None:
    """The C library's abort at a corrupt heap ends the process as it should."""

    def body() -> None:
        faulthandler.disable()  # it would print a traceback
        os.abort()

    assert _confined(kind, body) == -signal.SIGABRT


def test_only_vm_processes_kick_their_threads() -> None:
    """A VM process interrupts its own threads, by the one signal for that."""

    def body(number: int) -> None:
        signal.signal(number, lambda *_: None)
        signal.pthread_kill(threading.get_ident(), number)

    assert _confined(Kind.VM, partial(body, signal.SIGRTMIN)) == 0
    assert _confined(Kind.VM, partial(body, signal.SIGUSR1)) == -signal.SIGSYS
    assert _confined(Kind.DISK, partial(body, signal.SIGRTMIN)) == -signal.SIGSYS


def test_children_of_the_zygote_reach_themselves_alone() -> None:
    """A VM process that the zygote has forked kicks its own threads, and not the zygote's."""
    zygote: list[int] = []

    def kick(target: int) -> None:
        signal.signal(signal.SIGRTMIN, lambda *_: None)
        assert _call("tgkill", target, target, signal.SIGRTMIN) == 0

    def child_of_zygote() -> None:
        zygote.append(os.getpid())
        assert _confined(Kind.VM, lambda: kick(os.getpid())) == 0
        assert _confined(Kind.VM, lambda: kick(zygote[0])) == -signal.SIGSYS

    assert _confined(Kind.ZYGOTE, child_of_zygote) == 0


def test_the_parent_cannot_do_what_it_never_does() -> None:
    """Each call of the table fails there, with a reason; children confine themselves as before."""

    def body() -> None:
        deny(PARENT_DENIALS)
        failed = {one.name: _call(one.name, -1, -1, -1) for one in PARENT_DENIALS}
        assert failed == {one.name: -errno.EPERM for one in PARENT_DENIALS}
        assert min(len(one.reason) for one in PARENT_DENIALS) >= 3
        for kind in KINDS:
            assert _confined(kind, lambda: None) == 0, kind
            assert _confined(kind, _calling("mount")) == -signal.SIGSYS, kind

    assert _end_of(body) == 0


def test_what_executes_swtpm_cannot_do_more_than_the_parent() -> None:
    """Of the parent's denials it lacks those of programs, and it makes no sockets."""
    names = {one.name for one in TPM_DENIALS}
    sockets = {"socket", "connect", "bind", "listen", "accept", "accept4"}
    assert names == {one.name for one in PARENT_DENIALS} - {"execve", "execveat"} | sockets

    def body() -> None:
        deny(TPM_DENIALS)
        assert {_call(name, -1, -1, -1) for name in names} == {-errno.EPERM}

    assert _end_of(body) == 0


def test_the_manual_counts_right() -> None:
    """docs/security.md has the numbers of system calls and descriptors of each kind."""
    text = (Path(__file__).parents[3] / "docs" / "security.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    table = {row[0]: row[1:] for row in rows if row}
    assert table[""] == [str(kind) for kind in KINDS]
    confinements = {
        **CONFINEMENTS,
        Kind.ZYGOTE: zygote_confinement(UIDS),
        Kind.SHARE: share_confinement(0, is_writable=True),
    }
    calls = [len({one.name for one in confinements[kind].filter.allowed}) for kind in KINDS]
    assert table["system calls, some with certain arguments alone"] == list(map(str, calls))
    beside = {Kind.VM: "VM", Kind.DISK: "disk", Kind.NIC: "network"}
    compared = {kind: table[f"our {name} process"][0] for kind, name in beside.items()}
    assert compared == {kind: str(calls[KINDS.index(kind)]) for kind in beside}
    limits = [dict(CONFINEMENTS[kind].limits)[resource.RLIMIT_NOFILE] for kind in KINDS]
    assert table["descriptors at most"] == [f"{limit:,}" for limit in limits]
