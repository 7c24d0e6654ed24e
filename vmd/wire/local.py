"""What the parent and the local process say to each other: which guests are answered."""

from vmd.wire.encoding import Wire, WireEncoding
from vmd.wire.internal import LocalAddresses, SetVerbosity
from vmd.wire.parts import Internal


class ServeLocal(Internal, frozen=True, kw_only=True):
    """Answer the guest on a local interface: DHCP, router solicitations, DNS."""

    id: int
    """The VM's."""
    interface: str
    """For messages."""
    lladdr: str
    """The guest's."""
    addresses: LocalAddresses
    host_name: str = ""
    """What the guest is to be called; empty for nothing."""
    boots_from_net: bool = False
    frames: int = 0
    """Index of a packet socket, bound to the interface."""
    dns: tuple[int, ...] = ()
    """Indices of UDP sockets, bound to port 53 of the host's addresses there."""
    resolver: str = ""
    """The host's own DNS server; empty for none."""


class ForgetLocal(Internal, frozen=True, kw_only=True):
    """Serve none of a VM's interfaces any more."""

    id: int


ParentToLocal = ServeLocal | ForgetLocal | SetVerbosity


class LocalToParent(Internal, frozen=True, kw_only=True):
    """Nothing that the local process could say: it only listens."""


PARENT_AND_LOCAL: Wire[ParentToLocal, LocalToParent] = Wire(LocalToParent, WireEncoding.MSGPACK)
LOCAL_AND_PARENT: Wire[LocalToParent, ParentToLocal] = Wire(ParentToLocal, WireEncoding.MSGPACK)
