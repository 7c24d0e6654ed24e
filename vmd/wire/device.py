"""Messages from vmm to a process that serves a disk or an interface, which sends none."""

from vmd.wire.blank import JoinCgroup
from vmd.wire.encoding import Wire, WireEncoding
from vmd.wire.internal import DiskSpec, NicSpec, SetVerbosity
from vmd.wire.parts import Internal


class BeginDisk(Internal, frozen=True, kw_only=True):
    """Serve this disk of the VM called `vm`.

    Descriptors come along: a control group's if it has one, the image and its bases, then counters,
    a socket and a pipe.
    """

    disk: DiskSpec
    vm: str
    verbosity: int
    cgroup: int = 0
    """Number of its control group; 0 for none."""

    @property
    def device(self) -> str:
        """Its name in messages."""
        return self.disk.option.path


class BeginNic(Internal, frozen=True, kw_only=True):
    """Move the frames of this interface of the VM called `vm`.

    Descriptors come along: a control group's if it has one, the tap's queues, then counters, a
    socket and a pipe.
    """

    nic: NicSpec
    vm: str
    verbosity: int
    cgroup: int = 0
    """Number of its control group; 0 for none."""

    @property
    def device(self) -> str:
        """Its name in messages."""
        return self.nic.name


DeviceBegin = BeginDisk | BeginNic
VmmToDevice = DeviceBegin | JoinCgroup | SetVerbosity

VMM_AND_DEVICE: Wire[VmmToDevice, None] = Wire(None, WireEncoding.MSGPACK)
DEVICE_AND_VMM: Wire[None, VmmToDevice] = Wire(VmmToDevice, WireEncoding.MSGPACK)
