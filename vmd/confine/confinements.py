"""The confinement of each kind of process; each allowance has its reason.

Any other call ends the process, except for some that libraries try and can do without, which fail
(`_REFUSED`).

The filter of a process also binds those forked from it, so the zygote's holds what VM and device
processes need; theirs then drop what only the zygote needs. The parent has no filter: it
starts processes of every kind, and opens files for all of them.
"""

import errno
import resource
import signal
from enum import StrEnum

from vmd.confine.sandbox import Confinement
from vmd.confine.seccomp import Allow, Argument, Denial, Filter, OwnPid, Refuse
from vmd.confine.uids import Uids
from vmm_kvm.memfd import MODE
from vmm_kvm.net.abi import TUNSETIFF

CAP_SETGID, CAP_SETUID = 6, 7
CAP_NET_ADMIN = 12
PARENT_CAPABILITIES = {
    1: "CAP_DAC_OVERRIDE: files that vm.conf names, whoever they belong to",
    3: "CAP_FOWNER: modes of consoles that belong to others already",
    CAP_SETGID: "CAP_SETGID: processes that become other users",
    CAP_SETUID: "CAP_SETUID: the same",
    8: "CAP_SETPCAP: processes that give capabilities up",
    10: "CAP_NET_BIND_SERVICE: DNS for guests, on port 53",
    CAP_NET_ADMIN: "CAP_NET_ADMIN: priv, and what the parent opens for local",
    13: "CAP_NET_RAW: packet sockets for DHCP",
    21: "CAP_SYS_ADMIN: empty namespaces for processes",
}
"""Capabilities that the parent of root's daemon keeps, for itself or its children, by number."""

_AT_EMPTY_PATH = 0x1000
_CLONE_THREAD = 0x00010000
_CLONE_PARENT = 0x00008000
_CLONE_OWN_TID = 0x01200000  # CLONE_CHILD_CLEARTID, CLONE_CHILD_SETTID
_KVM_TYPE = 0xAE00  # _IO(KVMIO, 0)
_KVM_PLAIN = (
    *((0x80, 0xFFE0), (0x00, 0xFF80), (0xA0, 0xFFF0), (0xB0, 0xFFF8)),
    *((0xB8, 0xFFFE), (0xBD, 0xFFFF), (0xBE, 0xFFFE), (0xC0, 0xFFC0)),
)
_KVM_MEMORY_ENCRYPT_OP, _KVM_MEMORY_ENCRYPT_REG_REGION = 0xC008AEBA, 0x8010AEBB
_VHOST_TYPE = 0xAF00  # _IO(VHOST_VIRTIO, 0)
_TUNGETIFF, _TUNSETVNETHDRSZ, _TUNSETOFFLOAD = 0x800454D2, 0x400454D8, 0x400454D0
_TUNSETTXFILTER, _TUNSETQUEUE = 0x400454D1, 0x400454D9
_TYPE_MASK = 0xFF00
_TCGETS = 0x5401
_FIONBIO = 0x5421
_SIOCOUTQ = 0x5411
_F_DUPFD_CLOEXEC = 1030
_F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL = 1, 2, 3, 4
_F_ADD_SEALS = 1033
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_PROT_EXEC = 4
_PR_SET_NAME = 15
_SO_SNDBUF = 7
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_DGRAM, _TYPE_OF = 2, 0xF  # SOCK_DGRAM, SOCK_TYPE_MASK
_SETTINGS = "/proc/sys/net"


class Kind(StrEnum):
    """The kinds of processes, by the names that they have in the log."""

    CONTROL = "control"
    PRIV = "priv"
    LOCAL = "local"
    AGENTX = "agentx"
    VMM = "vmm"
    INIT = "init"
    TPM = "tpm"
    ZYGOTE = "zygote"
    VM = "vm"
    DISK = "disk"
    NIC = "nic"
    OPENER = "opener"
    SHARE = "share"


def _all(reason: str, *names: str) -> tuple[Allow, ...]:
    return tuple(Allow(name, reason) for name in names)


def _with(name: str, index: int, values: dict[int, str]) -> tuple[Allow, ...]:
    """Allow a call with certain values of one argument, each for a reason."""
    return tuple(Allow(name, why, (Argument(index, value),)) for value, why in values.items())


# Calls of an interpreter with one thread, an event loop and a socket.
_BASE = (
    *_all("memory of the interpreter", "brk", "munmap", "mremap", "madvise"),
    # No memory becomes code: nothing here loads or makes any.
    Allow("mmap", "memory of the interpreter", (Argument(2, 0, _PROT_EXEC),)),
    Allow("mprotect", "stacks of threads, guard pages", (Argument(2, 0, _PROT_EXEC),)),
    *_all("sockets, event descriptors and the log", "read", "write", "close"),
    *_all("messages with descriptors", "sendmsg", "recvmsg"),
    *_with("setsockopt", 2, {_SO_SNDBUF: "room for large messages"}),
    *_all("what a received descriptor is", "getsockname", "getsockopt", "fstat", "lseek"),
    Allow("newfstatat", "fstat, as newer C libraries do it", (Argument(3, _AT_EMPTY_PATH),)),
    *_with(
        "fcntl",
        1,
        {
            _F_GETFD: "whether a descriptor is inherited",
            _F_SETFD: "not to let it be",
            _F_GETFL: "whether it blocks",
            _F_SETFL: "not to let it",
            _F_DUPFD_CLOEXEC: "a descriptor of one's own",
        },
    ),
    *_with("ioctl", 1, {_FIONBIO: "sockets that do not block", _TCGETS: "is this a terminal?"}),
    *_all("the event loop", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "eventfd2"),
    *_all("waiting for one descriptor", "poll"),
    *_all("locks and conditions", "futex", "sched_yield"),
    *_all("signal handlers", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack"),
    *_all("calls that a signal has interrupted", "restart_syscall"),
    *_all("clocks, where the kernel does not map them", "clock_gettime", "gettimeofday"),
    *_all("time-outs", "clock_nanosleep"),
    *_all("hash seeds, names, entropy of the guest", "getrandom"),
    *_all("who one is, for the log and for abort", "getpid", "gettid", "getppid", "getuid"),
    Allow(
        "tgkill",
        "an assertion of the C library ends the process",
        (Argument(0, OwnPid.PID), Argument(2, signal.SIGABRT)),
    ),
    *_all("the end", "exit", "exit_group"),
)
# Calls that fail; libraries do without them.
_REFUSED = (
    Refuse("openat", errno.EACCES, "late imports, and the source lines of a traceback"),
    Refuse("open", errno.EACCES, "the same, by older C libraries"),
    Refuse("newfstatat", errno.EACCES, "the same"),
    Refuse("stat", errno.EACCES, "the same"),
    Refuse("readlink", errno.EACCES, "the C library looks for its own directory"),
    Refuse("clone3", errno.ENOSYS, "arguments in memory cannot be checked: clone does"),
    Refuse("ioctl", errno.ENOTTY, "a terminal is asked what only a terminal knows"),
    Refuse("prctl", errno.EINVAL, "names of threads, names of mappings"),
    Refuse("getcwd", errno.EACCES, "an import looks at where one is"),
)
_THREADS = (
    Allow("clone", "a thread; never a process", (Argument(0, _CLONE_THREAD, _CLONE_THREAD),)),
    *_all("what the C library sets up in a thread", "set_robust_list", "rseq", "sched_getaffinity"),
)
_NAMED = _with("prctl", 0, {_PR_SET_NAME: "whose it is, which it is told when it is confined"})
_KICKS = (
    Allow("tgkill", "vCPUs come out", (Argument(0, OwnPid.PID), Argument(2, signal.SIGRTMIN))),
)
_IMAGES = (
    *_all("disk images", "preadv", "pwritev", "preadv2", "pwritev2", "pread64"),
    *_all("their metadata", "pwrite64", "readv", "writev"),
    *_all("flushes", "fdatasync", "fsync", "sync_file_range"),
    *_all("discards and zeroes", "fallocate", "ftruncate"),
    *_with(
        "fcntl", 1, {_F_OFD_SETLK: "locks on images", _F_OFD_GETLK: "who else has an image open"}
    ),
)
_DISK = (
    *_NAMED,
    *_IMAGES,
    *_all("the connection's messages", "sendto", "recvfrom", "shutdown"),
)
_TAP = _with(
    "ioctl",
    1,
    {
        _TUNGETIFF: "whether a descriptor is a tap's",
        _TUNSETVNETHDRSZ: "headers in front of frames",
        _TUNSETOFFLOAD: "checksums and segments that the guest takes unfinished",
        _TUNSETTXFILTER: "which frames the guest wants",
        _TUNSETQUEUE: "how many queues the guest uses",
    },
)
_NIC = (
    *_NAMED,
    *_TAP,
    *_all("frames", "readv", "writev"),
    *_all("the connection's messages", "sendto", "recvfrom", "shutdown"),
)
_VM = (
    *_TAP,
    *_KICKS,
    Allow("ioctl", "all that vhost-net does", (Argument(1, _VHOST_TYPE, _TYPE_MASK),)),
    *_IMAGES,
    *_THREADS,
    # All requests but 0xba to 0xbc.
    *(
        Allow(
            "ioctl", "all that KVM does with plain memory", (Argument(1, _KVM_TYPE + first, mask),)
        )
        for first, mask in _KVM_PLAIN
    ),
    *_all("guest memory", "memfd_create"),
    *_with("fchmod", 1, {MODE: "that nobody else may open it"}),
    *_all("how much of it there is", "mincore"),
    *_with("fcntl", 1, {_F_ADD_SEALS: "memory whose size, or a kernel that nobody can change"}),
    *_NAMED,
    *_all("images into guest memory", "sendfile"),
    *_all("flushes of what the guest has mapped", "msync"),
    *_all("connections to device processes", "sendto", "recvfrom", "shutdown"),
)
_ENCRYPTION = _with(
    "ioctl",
    1,
    {
        _KVM_MEMORY_ENCRYPT_OP: "commands of one VM's launch to the processor's firmware",
        _KVM_MEMORY_ENCRYPT_REG_REGION: "encrypted memory that stays where it is",
    },
)
_PROCESSES = (
    *_all("their ends", "wait4"),
    *_all("their connections", "pipe2"),
)
_VMM = (
    *_PROCESSES,
    *_all("the connections of VM and device processes", "socketpair"),
    *_all("which of them to end", "pidfd_open"),
    *_all("counters of devices", "memfd_create", "ftruncate"),
    *_with("fchmod", 1, {MODE: "that nobody else may open them"}),
    *_with("fcntl", 1, {_F_ADD_SEALS: "counters whose size nobody can change"}),
)
_ZYGOTE = (
    *_VM,
    *_ENCRYPTION,
    *_DISK,
    *_NIC,
    *_PROCESSES,
    Allow("clone", "VM and device processes", (Argument(0, _CLONE_PARENT | signal.SIGCHLD),)),
    # The C library's fork has a flag or two besides.
    Allow("clone", "rehearsals", (Argument(0, signal.SIGCHLD, ~_CLONE_OWN_TID & 0xFFFFFFFF),)),
    *_all("rehearsals", "fork", "set_tid_address"),
    *_all("descriptors that they are not to have", "close_range"),
    *_all("ending them", "pidfd_send_signal"),
    # Its filter binds them too, and they have other numbers.
    *_with("tgkill", 2, {signal.SIGABRT: "the end of a child", signal.SIGRTMIN: "its vCPUs"}),
    *_all("limits of theirs", "prlimit64"),
    *_all("filters of theirs", "seccomp", "prctl"),
    *_all("rehearsals", "socketpair"),
    *_all("no files for them", "landlock_create_ruleset", "landlock_restrict_self"),
)
_PARCELS = (Allow("socketpair", "parcels for files of clients", (Argument(0, _AF_UNIX),)),)
_OPENER = (
    *_PARCELS,
    *_all("files by name, with a client's rights", "openat2"),
    *_all("on which file systems they are", "fstatfs"),
    *_all("headers of disk images", "preadv", "preadv2", "pread64", "readv"),
    *_with(
        "fcntl", 1, {_F_OFD_SETLK: "locks on images", _F_OFD_GETLK: "who else has an image open"}
    ),
)
_SHARE = (
    *_NAMED,
    *_all("files below the shared directory, by name", "openat2"),
    *_all("their contents", "preadv", "preadv2", "pread64"),
    *_all("what links say, entries of directories", "readlinkat", "getdents64"),
    *_all("how much room there is", "fstatfs"),
    *_all("flushes", "fsync", "fdatasync"),
    *_all("the connection's messages", "sendto", "recvfrom", "shutdown"),
)
_CHANGES = (
    *_all("contents of files", "pwritev", "pwritev2", "pwrite64", "ftruncate", "fallocate"),
    *_all(
        "names", "mkdirat", "mknodat", "symlinkat", "linkat", "unlinkat", "renameat", "renameat2"
    ),
    *_all("permissions and times", "fchmodat", "utimensat"),
)
"""Further rights of a share that can be written to."""
_CONTROL = (
    *_THREADS,
    *_PARCELS,
    *_all("clients", "accept4"),
    *_all("who a client is", "getpeername"),
    *_all("closing connections", "shutdown"),
    *_with("ioctl", 1, {_SIOCOUTQ: "whether a client has read what it was sent"}),
)
_PRIV = (
    *_all("rtnetlink and nftables", "socket", "bind", "sendto", "recvfrom", "setsockopt"),
    *_all("waiting for nftables", "select", "pselect6"),
    *_with("ioctl", 1, {TUNSETIFF: "taps"}),
    *_all("settings of the network, where Landlock allows no other files", "openat"),
)
_LOCAL = (
    *(
        Allow("socket", "DNS questions", (Argument(0, family), Argument(1, _DGRAM, _TYPE_OF)))
        for family in (_AF_INET, _AF_INET6)
    ),
    *_all("to the host's DNS server", "connect"),
    *_all("questions, answers and frames", "sendto", "recvfrom"),
)


def _never(reason: str, *names: str) -> tuple[Denial, ...]:
    return tuple(Denial(name, reason) for name in names)


PARENT_DENIALS = (
    *_never(
        "other processes' memory, registers and descriptors",
        *("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp"),
    ),
    *_never("programs: nothing is executed", "execve", "execveat"),
    *_never("code in the kernel", "bpf", "init_module", "finit_module", "delete_module"),
    *_never("another kernel, or none", "kexec_load", "kexec_file_load", "reboot"),
    *_never("ways around checks", "userfaultfd", "io_uring_setup", "perf_event_open"),
    *_never("files by number", "open_by_handle_at", "name_to_handle_at"),
    *_never("ports of the host's hardware", "iopl", "ioperm"),
    *_never("keys", "keyctl", "add_key", "request_key"),
    *_never("the host's swap, accounting, quotas", "swapon", "swapoff", "acct", "quotactl"),
    *_never("the host's name", "sethostname", "setdomainname"),
    *_never("the host's clock", "settimeofday", "clock_settime", "adjtimex", "clock_adjtime"),
    *_never("the host's log", "syslog"),
    *_never("namespaces that exist, other ABIs", "setns", "personality"),
    *_never("mounts of the newer kind", "fsopen", "fsmount", "move_mount", "mount_setattr"),
)
"""Calls that fail in the parent of root's daemon, and hence in all of its processes.

It is no allow-list: the filter binds its children, which mount, change users and confine
themselves.
"""

EXECUTING = frozenset({"execve", "execveat"})
"""System calls that the parent's filter cannot refuse where zygotes execute an interpreter."""

TPM_DENIALS = (
    *(one for one in PARENT_DENIALS if one.name not in EXECUTING),
    *_never("the network: what is used is connected already", "socket", "connect"),
    *_never("clients: the same", "bind", "listen", "accept", "accept4"),
)
"""Calls that fail in the process that executes swtpm, and in swtpm, which denies itself others."""
TPM_CAPABILITIES = {
    CAP_SETGID: "CAP_SETGID: users of their own for each",
    CAP_SETUID: "CAP_SETUID: the same, and ending one as its user",
}
"""Capabilities of that process, by number."""
SWTPM_LIMITS = (
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_NOFILE, 64),
    # Its state has some 10 KiB: it cannot fill the disk.
    (resource.RLIMIT_FSIZE, 1 << 20),
)

_NO_CORE = ((resource.RLIMIT_CORE, 0),)
"""A core dump would hold the memory of guests, or clients' messages."""

CONFINEMENTS = {
    Kind.CONTROL: Confinement(
        Filter((*_BASE, *_CONTROL), _REFUSED),
        # Descriptors of the clients that the control process accepts, files of theirs, keepers.
        (*_NO_CORE, (resource.RLIMIT_NOFILE, 32768)),
    ),
    Kind.PRIV: Confinement(
        Filter((*_BASE, *_PRIV), _REFUSED),
        (*_NO_CORE, (resource.RLIMIT_NOFILE, 256)),
        capabilities=frozenset({CAP_NET_ADMIN}),
        is_isolated=False,
        writable=(_SETTINGS,),
    ),
    Kind.LOCAL: Confinement(
        Filter((*_BASE, *_LOCAL), _REFUSED),
        # The sockets of many interfaces, and their questions.
        (*_NO_CORE, (resource.RLIMIT_NOFILE, 16384)),
        is_isolated=False,
    ),
    Kind.AGENTX: Confinement(
        Filter((*_BASE,), _REFUSED), (*_NO_CORE, (resource.RLIMIT_NOFILE, 64))
    ),
    Kind.VMM: Confinement(
        Filter((*_BASE, *_VMM), _REFUSED), (*_NO_CORE, (resource.RLIMIT_NOFILE, 65536))
    ),
    Kind.INIT: Confinement(Filter(_BASE, _REFUSED), (*_NO_CORE, (resource.RLIMIT_NOFILE, 64))),
    Kind.ZYGOTE: Confinement(
        Filter((*_BASE, *_ZYGOTE), _REFUSED), (*_NO_CORE, (resource.RLIMIT_NOFILE, 1024))
    ),
    Kind.OPENER: Confinement(
        Filter((*_BASE, *_OPENER), _REFUSED),
        # Files in parcels count as open for the client, as long as VMs have them.
        (*_NO_CORE, (resource.RLIMIT_NOFILE, 2048)),
        is_isolated=False,
        opens_files=True,
    ),
    # These are forked from the zygote, whose user and namespaces they have.
    Kind.VM: Confinement(
        Filter((*_BASE, *_VM), _REFUSED), (*_NO_CORE, (resource.RLIMIT_NOFILE, 1024))
    ),
    Kind.DISK: Confinement(
        Filter((*_BASE, *_DISK), _REFUSED), (*_NO_CORE, (resource.RLIMIT_NOFILE, 256))
    ),
    Kind.NIC: Confinement(
        Filter((*_BASE, *_NIC), _REFUSED), (*_NO_CORE, (resource.RLIMIT_NOFILE, 256))
    ),
    # See `share_confinement`.
    Kind.SHARE: Confinement(
        Filter((*_BASE, *_SHARE), _REFUSED),
        # Of files that its guest knows, and of those that it has open.
        (*_NO_CORE, (resource.RLIMIT_NOFILE, 16384)),
    ),
}


def encrypted_vm_confinement() -> Confinement:
    """Return the confinement of a VM process whose memory is encrypted."""
    base = CONFINEMENTS[Kind.VM]
    table = base.filter
    return base._replace(filter=Filter((*table.allowed, *_ENCRYPTION), table.refused))


def share_confinement(own: int, *, is_writable: bool) -> Confinement:
    """Return the confinement of a process that shares a directory.

    `own` is its descriptor of its own descriptors, by which it opens files that it has one of.
    """
    base = CONFINEMENTS[Kind.SHARE]
    table = base.filter
    opening = Allow("openat", "files that it has a descriptor of", (Argument(0, own),))
    changes = _CHANGES if is_writable else ()
    # Unlike in other processes, nothing may be opened by a name of anywhere else.
    return base._replace(filter=Filter((*table.allowed, opening, *changes), table.refused))


def zygote_confinement(uids: Uids | None) -> Confinement:
    """Return the confinement of a zygote whose children become users of `uids`, if any.

    It keeps two capabilities, which let a process become any user. Its filter lets it become those
    of `uids` alone, and binds its children; these keep no capability.
    """
    base = CONFINEMENTS[Kind.ZYGOTE]
    if uids is None:
        return base
    ours = tuple(Argument(number, uids.part.first, uids.part.mask) for number in range(3))
    becoming = (
        Allow("setresuid", "a user for each VM, and the right to end its processes", ours),
        Allow("setresgid", "a group for each VM", ours),
        *_all("no capabilities for them", "capset"),
    )
    table = base.filter
    return base._replace(
        filter=Filter((*table.allowed, *becoming), table.refused),
        capabilities=frozenset({CAP_SETGID, CAP_SETUID}),
    )
