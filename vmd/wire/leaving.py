"""What is said to and by the process of a VM that leaves the daemon."""

from typing import Annotated

import msgspec

from vmd.wire.messages import ErrorCode
from vmd.wire.parts import TEXT_MAX, Internal, Part
from vmd.wire.transfers import SentBoot


class HandoverPlan(Part, frozen=True, kw_only=True):
    """How long a VM that is handed over may stand still."""

    downtime_ms: int
    timeout_s: int
    """How long to wait until that is enough; 0 for ever."""
    forces: bool
    """It may stand still for longer then."""
    copies_storage: bool = False
    """Disks go along that the receiver wants."""


class SendVm(Internal, frozen=True, kw_only=True):
    """Write yourself into the stream that comes along, and end; or say `VmSent` and go on."""

    keeps_running: bool
    is_snapshot: bool = False
    """It is an empty file, for a snapshot that can be mapped."""
    keeps_disks: bool = False
    """The disks that it writes go into the snapshot too."""
    uid: int | None
    """Of the owner."""
    gid: int | None
    boot: SentBoot
    handover: HandoverPlan | None = None
    """If it is handed over: then a second descriptor is of what the receiver says."""


class CancelSendVm(Internal, frozen=True, kw_only=True):
    """Write no more, if it is not too late."""


MIGRATING_MAX = 60
"""How often a VM process tells of one hand-over, or snapshot, how far it is."""


class VmMigrating(Internal, frozen=True, kw_only=True):
    """How far its hand-over to another host, or a snapshot, is."""

    message: Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]


class VmSent(Internal, frozen=True, kw_only=True):
    """All is written, or the stream is of no use; the guest goes on, if it ran before."""

    failure: ErrorCode | None = None
    """Why it is of no use; None if it is."""
    message: Annotated[str, msgspec.Meta(max_length=TEXT_MAX)] = ""
