"""A VM as the daemon knows it: configuration, owner, state."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from vmd.config.disks import DiskKind, DiskOption
from vmd.config.forwards import host_address
from vmd.config.model import (
    MEMORY_DEFAULT,
    ForwardConfig,
    GuestClock,
    InterfaceConfig,
    Owner,
    Right,
    VmConfig,
)
from vmd.config.shares import ShareOption
from vmd.rules import lifecycle
from vmd.rules.ends import History
from vmd.rules.vm_state import IDLE, Phase, VmState
from vmd.wire.leaving import HandoverPlan
from vmd.wire.messages import EndInfo, ForwardRequest, Start, State, VmInfo
from vmd.wire.parts import DiskRequest
from vmd.wire.transfers import Receive, Send
from vmm_kvm.net.ethernet import parse_lladdr


class Passed(NamedTuple):
    """Files that a client has opened for a VM, or that were opened with the client's rights.

    The holder owns the descriptors. The configuration names the other files.
    """

    uid: int
    """The client's user id."""
    kernel: int | None = None
    path: str = ""
    """Of the kernel, for messages."""
    is_firmware: bool = False
    """The kernel is firmware, which may have variables."""
    initrd: tuple[int, ...] = ()
    append: str | None = None
    """The command line that goes with the kernel."""
    cdrom: int | None = None
    disks: tuple[tuple[int, ...], ...] = ()
    """Of each disk, the image and its bases; empty for one that is named."""
    is_judged: bool = False
    """All are checked, the disks are locked, and no path needs to be followed any more."""
    formats: tuple[tuple[DiskKind, ...], ...] = ()
    """Of each file of each disk, once they are judged."""
    shares: tuple[int | None, ...] = ()
    """Of each shared directory; None for one that is named. Their processes check them."""
    stamp: str = ""
    """Of the kernel, once that is judged; empty if a change might not show in it."""
    stream: int | None = None
    """The source of a VM that is received, or the target of one that is sent."""
    replies: int | None = None
    """The receiver's messages to the sender, when a VM is handed over."""
    manifest: str = ""
    """The manifest of the stream."""
    stays_paused: bool = False
    """It is to be paused when it is received."""
    is_snapshot: bool = False
    """The stream is a snapshot's file."""
    is_copy: bool = False
    """It is a copy of the VM that was written."""
    clock: GuestClock = GuestClock.NOW
    """Of one that is received."""

    @property
    def has_sender(self) -> bool:
        """Whether another VM may have the locks of the disks until all of it has come."""
        return self.stream is not None and not self.is_snapshot

    @property
    def has_kernel(self) -> bool:
        """Whether a boot image is among them."""
        return self.kernel is not None

    @property
    def fds(self) -> list[int]:
        """All descriptors."""
        single = (self.kernel, self.cdrom, self.stream, self.replies)
        return [
            *(fd for fd in single if fd is not None),
            *self.initrd,
            *(fd for fd in self.shares if fd is not None),
            *(fd for chain in self.disks for fd in chain),
        ]


class Sink(NamedTuple):
    """The target of writing a VM."""

    fd: int | None = None
    """A stream, or an empty file; its holder's. None for the daemon's store."""
    is_snapshot: bool = False
    uid: int = 0
    """The owner of the snapshot in the store."""
    name: str = ""
    """Of the snapshot there."""
    replies: int | None = None
    """The receiver's messages, if the VM is handed over; its holder's."""
    keeps_disks: bool = False
    """The snapshot has the disks that the VM writes."""


class Inherited:
    """Files that a VM shares with its clones; its maker closes them when they are unused."""

    def __init__(self, passed: Passed) -> None:
        """Hold descriptors."""
        self.passed = passed


class Captured:
    """State for clones of a VM; its maker closes it when it is unused."""

    def __init__(self, state: int, memory: int, inherited: Inherited | None) -> None:
        """Hold two descriptors of memory, and what of its files clones have."""
        self.state = state
        self.memory = memory
        self.inherited = inherited


class Vm:
    """One VM, from its registration until it is forgotten; the registry's."""

    __slots__ = (
        *("checked", "config", "has_run", "new_file", "passed", "passed_is_lasting", "requester"),
        *("history", "last_end", "sink", "started_at", "state"),
        *("captured", "clone_of", "configured", "has_timed_out", "inherited", "lent", "origin"),
    )

    def __init__(self, config: VmConfig, state: VmState, requester: int) -> None:
        """Make a VM that `requester`, a user id, has asked for."""
        self.config = config
        """Complete, and with an lladdr for each interface."""
        self.configured: VmConfig | None = None
        """Its configuration after it has ended, if it continues from a snapshot."""
        self.state = state
        self.requester = requester
        self.checked: frozenset[Right] = frozenset()
        """Those of BOOT, CDROM and DISK that open with the requester's rights, not with root's."""
        self.passed: Passed | None = None
        """Files instead of those that `config` names."""
        self.passed_is_lasting = False
        """It is for every boot of this VM, not only for the next."""
        self.sink: Sink | None = None
        """The target to which it is to be written, until its process has it."""
        self.captured: Captured | None = None
        """State for its clones, while it is paused."""
        self.origin: Captured | None = None
        """Its own state to continue from, until its guest runs, if it is a clone."""
        self.lent: Inherited | None = None
        """Files that its clones have too, with all disks, while it is a template that runs."""
        self.inherited: Inherited | None = None
        """Files of the VM that it is a clone of, for all of its starts."""
        self.clone_of = ""
        """The name of that VM."""
        self.has_timed_out = False
        """Its watchdog has reset it, and no driver has cleared that: of the last start."""
        self.has_run = False
        """Its guest has been running at some time."""
        self.new_file: str | None = None
        """A file that was made for this start: it is removed if the start fails."""
        self.started_at: float | None = None
        """When its guest began to run, in seconds since 1970-01-01 UTC."""
        self.last_end: EndInfo | None = None
        self.history = History()
        """Its log lines."""

    def give_up_stream(self) -> Passed | None:
        """Return the descriptors by which it came, now that it runs; they are the caller's.

        A sender on another host waits until they are closed.
        """
        passed = self.passed
        if passed is None or passed.stream is None:
            return None
        self.passed = passed._replace(stream=None, replies=None)
        return Passed(uid=passed.uid, stream=passed.stream, replies=passed.replies)

    def give_back(self, *, is_forgotten: bool) -> None:
        """Drop what its clones had of it, or it had of another VM, as far as it is of no use.

        Others may remember this VM for a while, and what it had would stay open.
        """
        if self.state.phase is not Phase.PAUSED:
            self.captured = None  # it is not as it was any more
        if not self.state.is_template:
            self.lent = None
        if is_forgotten:
            self.origin = self.inherited = None

    def drop_passed(self) -> Passed | None:
        """Forget the settings of one boot; returns descriptors to close, if any."""
        passed = self.passed
        if self.configured is not None and self.state.phase in IDLE:
            self.config, self.configured = with_states(self.configured, self.config), None
            self.passed_is_lasting = False
        if not self.passed_is_lasting:
            self.passed = None
            return passed
        if passed is None or passed.stream is None:
            return None
        self.passed = passed._replace(stream=None, is_snapshot=False, manifest="")
        return Passed(uid=passed.uid, stream=passed.stream)

    @property
    def files(self) -> Passed | None:
        """Files instead of those that `config` names, its own or inherited; not to be closed."""
        return self.passed or (self.inherited.passed if self.inherited else None)

    @property
    def id(self) -> int:
        """The id, unique among VMs."""
        return self.state.id

    @property
    def name(self) -> str:
        """The name, unique among VMs."""
        return self.config.name


def with_states(config: VmConfig, told: VmConfig) -> VmConfig:
    """Return a configuration whose interfaces are up or down as those of `told` are.

    As they are, where `told` has not as many.
    """
    if len(config.interfaces) != len(told.interfaces):
        return config
    interfaces = zip(config.interfaces, told.interfaces, strict=True)
    return config._replace(
        interfaces=tuple(one._replace(is_up=other.is_up) for one, other in interfaces)
    )


HELD = "held by the kernel"
"""The reason for which a VM that was killed is still stopping."""


def info(vm: Vm, *, is_gone: bool = False) -> VmInfo:
    """Return the description of a VM, without asking its process."""
    config, state = vm.config, vm.state
    return VmInfo(
        id=vm.id,
        name=vm.name,
        state=State.GONE if is_gone else lifecycle.shown_state(state),
        cpus=config.cpus or 1,
        memory=config.memory or MEMORY_DEFAULT,
        pid=state.pid,
        tty=state.tty,
        pause_reason=state.halt.reason if state.halt else HELD if state.held else "",
        uid=config.owner.uid or 0,
        gid=config.owner.gid,
        is_from_config=state.is_from_config,
        started_at=vm.started_at,
        clone_of=vm.clone_of,
        is_template=state.is_template,
        has_tpm=config.has_tpm,
        after=config.after,
        last_end=vm.last_end,
    )


def completed(
    config: VmConfig,
    uid: int,
    made: Callable[[int, str, int, set[str | None]], str],
    taken: set[str | None],
) -> VmConfig:
    """Return a configuration with defaults filled in, of a VM that `uid` asks for.

    `made` makes up lladdrs that are not given, which are not among those that are `taken`.
    """
    owner = config.owner
    owner = owner._replace(uid=uid) if owner.uid is None else owner
    taken = taken | {each.lladdr for each in config.interfaces}
    return config._replace(
        memory=config.memory if config.memory is not None else MEMORY_DEFAULT,
        cpus=config.cpus or 1,
        owner=owner,
        interfaces=tuple(
            interface
            if interface.lladdr is not None
            else interface._replace(lladdr=made(owner.uid or 0, config.name, index, taken))
            for index, interface in enumerate(config.interfaces)
        ),
    )


def received_config(request: Receive, owner: Owner) -> VmConfig:
    """Return the configuration of a VM that is to be received.

    Raises:
        ValueError: a disk's kind is unknown, or an lladdr is none; `str()` is one line.
    """
    return VmConfig(
        name=request.name,
        memory=request.memory,
        cpus=request.cpus,
        boot=request.boot or None,
        initrd=request.initrd,
        append=request.append,
        firmware=request.firmware or None,
        boot_device=request.boot_device,
        has_vsock=request.has_vsock,
        has_balloon=request.has_balloon,
        has_watchdog=request.has_watchdog,
        disks=tuple(_disk(disk, _RECEIVED_KINDS) for disk in request.disks),
        cdrom=request.cdrom or (None if request.cdrom_image is None else "cdrom"),
        interfaces=tuple(
            InterfaceConfig(
                is_local=each.is_local,
                switch=each.switch or None,
                group=each.group or None,
                lladdr=parse_lladdr(each.lladdr).hex(":"),
                is_locked=each.is_locked,
                rdomain=each.rdomain,
                is_up=each.is_up,
                mtu=each.mtu,
                queues=each.queues,
            )
            for each in request.interfaces
        ),
        owner=owner,
        given=frozenset({Right.BOOT, Right.MEMORY}),
    )


def why_not_saved(config: VmConfig) -> str:
    """Return why a VM with shared directories is neither written nor cloned."""
    return f"share {config.shares[0].tag}: what its guest has open there cannot be saved"


def asks_for_devices(wanted: VmConfig, config: VmConfig) -> bool:
    """Tell whether a request wants devices that a VM does not have."""
    return (
        (wanted.has_vsock and not config.has_vsock)
        or (wanted.has_balloon and not config.has_balloon)
        or (wanted.has_watchdog and not config.has_watchdog)
        or (wanted.has_tpm and not config.has_tpm)
    )


_KINDS = {"": DiskKind.PROBE, "raw": DiskKind.RAW, "qcow2": DiskKind.QCOW2}
_RECEIVED_KINDS = {**_KINDS, "pmem": DiskKind.PMEM, "vhost-user": DiskKind.VHOST_USER}


def config_of(request: Start, owner: Owner) -> VmConfig:
    """Return the configuration that a request to start asks for.

    Raises:
        ValueError: a disk's format is unknown, or an address is none; `str()` is one line.
    """
    given = {
        Right.BOOT: request.kernel is not None
        or bool(request.firmware or request.initrd)
        or request.append is not None,
        Right.CDROM: bool(request.cdrom) or request.cdrom_image is not None,
        Right.CPUS: request.cpus is not None,
        Right.DISK: bool(request.disks),
        Right.INSTANCE: bool(request.instance),
        Right.INTERFACE: bool(request.interfaces),
        Right.MEMORY: request.memory is not None,
        Right.SHARE: bool(request.shares),
    }
    return VmConfig(
        name=request.name,
        parent=request.instance or None,
        memory=request.memory,
        cpus=request.cpus,
        append=request.append,
        firmware=request.firmware or None,
        boot_device=request.boot_device,
        has_vsock=request.has_vsock,
        has_balloon=request.has_balloon,
        has_watchdog=request.has_watchdog,
        has_tpm=request.has_tpm,
        disks=tuple(_disk(disk, _KINDS) for disk in request.disks),
        cdrom=request.cdrom or (None if request.cdrom_image is None else "cdrom"),
        interfaces=tuple(
            InterfaceConfig(
                is_local=each.is_local,
                switch=each.switch or None,
                forwards=tuple(map(_forward, each.forwards)),
            )
            for each in request.interfaces
        ),
        shares=tuple(
            ShareOption(share.path, share.tag, share.is_read_only) for share in request.shares
        ),
        owner=owner,
        given=frozenset(right for right, is_given in given.items() if is_given),
    )


def _forward(request: ForwardRequest) -> ForwardConfig:
    address = host_address(request.address) if request.address else ""
    return ForwardConfig(str(request.protocol), request.port, request.to_port, address)


def _disk(request: DiskRequest, kinds: Mapping[str, DiskKind]) -> DiskOption:
    if request.format not in kinds:
        raise ValueError(f"{request.path}: unknown disk format {request.format!r}")
    is_written = not (request.is_read_only or request.is_snapshot)
    if request.window and (is_written or request.format != "raw"):
        raise ValueError(f"{request.path}: a part of a file is raw, and only read")
    return DiskOption(
        kinds[request.format],
        request.path,
        is_read_only=request.is_read_only,
        serial=request.serial,
        queues=request.queues,
        on_error=request.error,
        is_private=request.is_private,
        is_snapshot=request.is_snapshot,
        window=request.window,
    )


def handover_plan(request: Send) -> HandoverPlan | None:
    """Return how a VM is handed over, as a client asks for it; None if it is not."""
    if request.replies is None:
        return None
    return HandoverPlan(
        downtime_ms=request.downtime_ms,
        timeout_s=request.timeout_s,
        forces=request.forces,
        copies_storage=request.copies_storage,
    )
