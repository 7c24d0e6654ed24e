"""A vm.conf as values: the product of the parser, and all that the daemon knows of it.

Nothing here has been checked against the host, save that paths of disks, kernels and firmware are
absolute and were there, and that users and groups exist. A field is None, or empty, where the file
says nothing: the user of the value, or a template, then has the default.

Every record is a NamedTuple of plain values, so that a message can carry it.

Source: vm.conf(5); section 4 of OpenBSD's behaviour.
"""

from enum import StrEnum
from typing import NamedTuple

from vmd.config.disks import DiskOption
from vmd.config.seeds import SeedOption
from vmd.config.shares import ShareOption
from vmm_kvm.boot_device import BootDevice

RDOMAIN_MAX = 255
FORWARDS_MAX = 64
"""Of one interface."""
AFTER_MAX = 32
"""VMs that one VM starts after."""
STOP_TIMEOUT_MAX_S = 86400
PATH_BYTES_MAX = 1023
MEMORY_DEFAULT = 512 << 20
AGENTX_PATH = "/var/agentx/master"


class Right(StrEnum):
    """Parts of a template that an instance may replace: words of `allow instance`.

    CPUS is never granted by a file. Source: section 9.2 of OpenBSD's behaviour.
    """

    BOOT = "boot"
    CDROM = "cdrom"
    CPUS = "cpus"
    DISK = "disk"
    INSTANCE = "instance"
    INTERFACE = "interface"
    MEMORY = "memory"
    SHARE = "share"


class GuestClock(StrEnum):
    """The clock of a VM started from a snapshot: words of `clock`."""

    FROZEN = "frozen"
    """It continues from the snapshot's."""
    NOW = "now"
    """It shows the host's time."""


class Owner(NamedTuple):
    """The owner of something. A uid of None is the user that runs the daemon, mostly root."""

    uid: int | None = None
    gid: int | None = None


class Prefix(NamedTuple):
    """A network: `address` is its first, a number of 32 or 128 bits; `bits` are the mask's ones."""

    address: int
    bits: int


class Staggered(NamedTuple):
    """How VMs start: `parallelism` at once, every `delay_s` seconds."""

    parallelism: int
    delay_s: int


class Agentx(NamedTuple):
    """The SNMP sub-agent: its context, if any, and the socket of the master agent."""

    context: str = ""
    path: str = AGENTX_PATH


class ForwardConfig(NamedTuple):
    """A port of the host that leads to one of a guest."""

    protocol: str
    """`tcp` or `udp`."""
    port: int
    to_port: int
    address: str = ""
    """The host's address that leads there; all of them if empty."""

    @property
    def passt_ports(self) -> str:
        """A value of passt's options `-t` and `-u`."""
        ports = f"{self.port}:{self.to_port}"
        return f"{self.address}/{ports}" if self.address else ports


class SwitchConfig(NamedTuple):
    """A switch: a bridge of the host, and the properties that interfaces on it inherit."""

    name: str
    interface: str
    is_enabled: bool = True
    group: str | None = None
    is_locked: bool = False
    """Members drop frames whose source is not their lladdr."""
    rdomain: int | None = None
    is_up: bool = True
    is_created: bool = False
    """The bridge is made by vmd, and removed by it."""
    address: str | None = None
    """The host's on a bridge that is made, such as `10.0.0.1/24`."""


class InterfaceConfig(NamedTuple):
    """A network interface of a VM."""

    is_local: bool = False
    """It is not on a switch: it has an address of the local prefix, given by DHCP."""
    tap: str | None = None
    """The host's side, such as `tap3`; None for any that is free."""
    switch: str | None = None
    group: str | None = None
    lladdr: str | None = None
    """Such as `fe:e1:bb:d1:00:01`; None for a random one."""
    is_locked: bool = False
    rdomain: int | None = None
    is_up: bool = True
    mtu: int | None = None
    """Bytes, without the Ethernet header; None for 1500."""
    queues: int | None = None
    """Pairs of queues; None for one."""
    forwards: tuple[ForwardConfig, ...] = ()


class VmConfig(NamedTuple):
    """A VM."""

    name: str
    parent: str | None = None
    """The template, of which this is an instance."""
    is_enabled: bool = True
    memory: int | None = None
    """Bytes, a multiple of 1 MiB."""
    cpus: int | None = None
    cpu_limit: int | None = None
    """Processor time in percent of one processor; None for any."""
    boot: str | None = None
    """Absolute path of a kernel or firmware image."""
    initrd: tuple[str, ...] = ()
    """Absolute paths; more than one only for Multiboot kernels."""
    append: str | None = None
    """The kernel's command line."""
    firmware: str | None = None
    """`bios`, `uefi`, or an absolute path."""
    boot_device: BootDevice = BootDevice.AUTO
    disks: tuple[DiskOption, ...] = ()
    """With absolute paths."""
    cdrom: str | None = None
    """Path as written; it is looked up when the VM starts."""
    interfaces: tuple[InterfaceConfig, ...] = ()
    shares: tuple[ShareOption, ...] = ()
    """With absolute paths; they are looked up when the VM starts."""
    seed: SeedOption | None = None
    """With absolute paths. In the daemon the last disk is the seed, which each boot makes anew."""
    owner: Owner = Owner()
    allow_instance: frozenset[Right] = frozenset()
    instance_owner: Owner | None = None
    """The users who may make instances of it, besides root."""
    allow_snapshot: bool = False
    """Its owner may make snapshots of it."""
    given: frozenset[Right] = frozenset()
    """The parts that the block names, which an instance thereby claims; INSTANCE if it is one."""
    is_sev: bool = False
    is_sev_es: bool = False
    has_vsock: bool = False
    """It has a vsock device, by which clients of the daemon reach ports of the guest."""
    has_balloon: bool = False
    """It has a memory balloon, by which memory that the guest frees goes back to the host."""
    has_watchdog: bool = False
    """It has a watchdog, which resets a guest that hangs."""
    has_tpm: bool = False
    """It has a TPM, whose secrets the daemon keeps by the VM's name and owner."""
    after: tuple[str, ...] = ()
    """VMs that run before the daemon starts this one, and that it stops after this one."""
    stop_timeout_s: int | None = None
    """How long its guest may take to stop before it is ended; None for the usual times."""
    where: str = ""
    """`file:line` of the end of its block, for complaints at registration."""


class Limits(NamedTuple):
    """Limits of all VMs together that one ordinary user has made.

    Generous: they protect the host from a user's mistake, not from his work.
    """

    vms: int = 64
    cpus: int = 256
    """Each is a thread of the host."""
    memory: int = 64 << 30
    """Bytes."""
    snapshots: int = 16
    """In the daemon's store."""
    storage: int = 64 << 30
    """Bytes of these."""


class Config(NamedTuple):
    """The contents of a vm.conf, in its order.

    Of VMs and switches of the same name the first counts.
    """

    vms: tuple[VmConfig, ...] = ()
    switches: tuple[SwitchConfig, ...] = ()
    """Disabled ones too."""
    socket_owner: Owner | None = None
    local_prefix: Prefix | None = None
    """IPv4."""
    is_nat: bool = False
    """Local interfaces reach the world under the host's addresses."""
    is_local_inet6: bool = False
    """Local interfaces have IPv6 addresses."""
    local_prefix6: Prefix | None = None
    """None for a random one, if there is IPv6 at all."""
    staggered: Staggered | None = None
    limits: Limits = Limits()
    snapshots: str | None = None
    """Absolute path of the directory of snapshots; None for the usual one."""
    clock: GuestClock = GuestClock.FROZEN
    """Of VMs that are started from a snapshot."""
    agentx: Agentx | None = None
    includes: tuple[str, ...] = ()
    """Included files or patterns, with absolute paths."""
    warnings: tuple[str, ...] = ()
    """Warnings for the operator."""
