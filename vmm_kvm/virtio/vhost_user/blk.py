"""A disk that another process serves, by vhost-user."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from vmm_kvm.virtio.vhost_user.client import Client
from vmm_kvm.virtio.vhost_user.frontend import SharedMemory, VhostUser

if TYPE_CHECKING:
    import socket


class RemoteBlkSpec(NamedTuple):
    """A disk of a machine, served by another process."""

    connect: "Callable[[], socket.socket]"
    """Returns a connection to it, for one machine, which owns it."""
    name: str
    """For the log."""
    may_halt: bool = False
    """Whether the server is ours, and may have requests wait for the host."""
    kind: Literal["remote-blk"] = "remote-blk"


def make_remote_blk(spec: RemoteBlkSpec, memory: SharedMemory) -> VhostUser:
    """Connect to the server of a disk.

    Raises:
        VmmError, OSError: it cannot be connected to, or serves no disk.
    """
    return VhostUser(Client(spec.connect()), memory, spec.name, may_halt=spec.may_halt)
