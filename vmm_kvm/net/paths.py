"""The paths that frames of a guest's network interface can take, and the parts of each.

Everything is open already: the process that made the taps and opened /dev/vhost-net passes
descriptors on, so that a VM needs no privilege to have a network.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # most machines need no sockets, which take milliseconds to load
    import socket


class VhostPath(NamedTuple):
    """The kernel moves frames between the guest and taps (vhost-net); no process sees them.

    Source addresses have to be enforced on the tap.
    """

    taps: tuple[int, ...]
    """A tap's queues, 1 to 16: descriptors of /dev/net/tun, each attached by TUNSETIFF with
    IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, and with IFF_MULTI_QUEUE where there are several."""
    vhosts: tuple[int, ...]
    """As many descriptors of /dev/vhost-net, each opened for this interface and not used yet."""


class TapPath(NamedTuple):
    """A thread of the process that has the machine moves frames between the guest and a tap."""

    taps: tuple[int, ...]
    """As VhostPath has them."""


class Traffic:
    """How many bytes of frames have gone through an interface: one writer, any reader."""

    __slots__ = ("received", "sent")

    def __init__(self) -> None:
        self.received = 0
        """By the guest."""
        self.sent = 0


class StreamPath(NamedTuple):
    """The same, with frames on a stream socket, each after its length in 32 bits, big-endian.

    passt(1) and QEMU's `-netdev stream` use this format.
    """

    fd: int
    traffic: Traffic
    """Counts the traffic, across the machines that use it in turn; no kernel counts it."""


class RemotePath(NamedTuple):
    """A vhost-user-net server moves them: a device process of ours, or a program such as passt."""

    connect: "Callable[[], socket.socket]"
    """Returns a connection to it, for one machine, which owns it."""
    is_ours: bool
    """Whether the server is our own, which also serves the control queue and knows the address."""
    pairs: int = 1
    """Queue pairs that a server other than ours must have, 1 to 16."""


Path = VhostPath | TapPath | StreamPath | RemotePath
