"""How a process that is to be a VM's or a device's comes to wait for what it is to be."""

from enum import StrEnum


class Role(StrEnum):
    """What a process that the zygote forks is to be."""

    VM = "vm"
    DISK = "disk"
    NIC = "nic"


class Preparation(StrEnum):
    """What a process does before it waits to be told what it is to be."""

    NONE = "none"
    """It confines itself: somebody waits for it."""
    CONFINED = "confined"
    """It says `BLANK_IS_READY` besides."""
    REHEARSED = "rehearsed"
    """It does what it will do, and forgets it, before it says so."""


BLANK_IS_READY = b"\0"
"""The packet by which a process that was made ahead says that it waits; messages follow."""
BLANK_IS_COLD = b"\1"
"""The same from one that could not rehearse; the next need not try."""
