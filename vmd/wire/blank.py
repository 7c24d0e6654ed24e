"""From the zygote's fork to a blank process that waits for its task."""

from enum import StrEnum

from vmd.wire.encoding import Wire, WireEncoding
from vmd.wire.parts import Internal


class Role(StrEnum):
    """The role of a process that the zygote forks."""

    VM = "vm"
    ENCRYPTED_VM = "encrypted vm"
    """Besides, it may give commands to the processor's firmware."""
    DISK = "disk"
    NIC = "nic"


class Preparation(StrEnum):
    """A process's work before it waits for its task."""

    NONE = "none"
    """It confines itself: a start waits for it."""
    CONFINED = "confined"
    """It says `BLANK_IS_READY` besides."""
    REHEARSED = "rehearsed"
    """It rehearses its task, and forgets it, before it reports itself ready."""
    CLONE = "clone"
    """It rehearses being a clone as well."""


BLANK_IS_READY = b"\0"
"""The packet by which a process made ahead reports itself ready; messages follow."""
BLANK_IS_COLD = b"\1"
"""The same from a process that could not rehearse; the next need not try."""


class SpareCgroup(Internal, frozen=True, kw_only=True):
    """The next VM is likely to have this control group: processes that wait may join it ahead.

    For vmm, from the parent. Two descriptors for joining come along, of the VM's process and of its
    devices'.
    """

    number: int
    """At least 1."""


class JoinCgroup(Internal, frozen=True, kw_only=True):
    """Join the control group whose descriptor comes along; for a process that has no task yet."""

    number: int


VMM_AND_BLANK: Wire[JoinCgroup, None] = Wire(None, WireEncoding.MSGPACK)
"""For all roles."""
