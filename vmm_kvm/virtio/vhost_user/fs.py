"""A file system that another process serves, by vhost-user."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from vmm_kvm.virtio.abi import VIRTIO_ID_FS
from vmm_kvm.virtio.fs_config import REQUEST_QUEUES, config_of
from vmm_kvm.virtio.vhost_user.client import Client
from vmm_kvm.virtio.vhost_user.frontend import DeviceKind, SharedMemory, VhostUser

if TYPE_CHECKING:
    import socket

FS: Final = DeviceKind(VIRTIO_ID_FS, 0, 0, lambda *_: 1 + REQUEST_QUEUES)
"""The server has the queues; we have the configuration space, since not every server has one."""


class RemoteFsSpec(NamedTuple):
    """A file system of a machine, served by another process."""

    connect: "Callable[[], socket.socket]"
    """Returns a connection to it, for one machine, which owns it."""
    tag: bytes
    """By which the guest mounts it: 1 to 36 bytes, none of them zero."""
    name: str
    """For the log."""
    kind: Literal["remote-fs"] = "remote-fs"


def make_remote_fs(spec: RemoteFsSpec, memory: SharedMemory) -> VhostUser:
    """Connect to the server of a file system.

    Raises:
        VmmError, OSError: it cannot be connected to, or serves no file system.
    """
    remote = VhostUser(Client(spec.connect()), memory, spec.name, FS)
    remote.override(0, config_of(spec.tag))
    return remote
