"""The device that a VM boots from."""

from enum import StrEnum


class BootDevice(StrEnum):
    """The device that firmware boots from, as vm.conf(5) and the `-B` of vmctl(8) name it."""

    AUTO = "auto"
    DISK = "disk"
    CDROM = "cdrom"
    NET = "net"
