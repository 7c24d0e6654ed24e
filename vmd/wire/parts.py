"""Parts of messages: what all have in common, and the counters of a VM."""

import msgspec


class Part(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A part of a message."""


class Moved(Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False):
    """What a device has moved since its VM's process began, in bytes."""

    index: int
    """Of the device among those of its kind, as the VM's configuration has them."""
    to_guest: int
    from_guest: int


class Exits(Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False):
    """How often a guest was left for a reason."""

    reason: str
    count: int


class Statistics(Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False):
    """What a VM has used since its process began."""

    cpu_ns: int = 0
    """Processor time of all its processes, in nanoseconds."""
    disk_read: int = 0
    """Bytes."""
    disk_written: int = 0
    net_received: int = 0
    net_sent: int = 0
    disks: tuple[Moved, ...] = ()
    """Those whose transfers this daemon counts."""
    streams: tuple[Moved, ...] = ()
    """Interfaces whose frames go to passt: nobody else counts them."""
    exits: tuple[Exits, ...] = ()
    """How often the guest was left, as KVM counts."""
