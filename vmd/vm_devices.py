"""How a VM's process and those of its devices are joined; descriptors, nothing else."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

from vmd.internal import VmSpec


class DeviceConnection(NamedTuple):
    """The VM's side of a device process: both descriptors belong to whoever holds this."""

    socket: int
    """To the device process, by vhost-user."""
    status: int
    """Reads a byte 0 when the device process is ready, or else why it cannot be."""


class Connections(NamedTuple):
    """A VM's connections to its device processes, in the order of its devices."""

    disks: tuple[DeviceConnection | None, ...]
    """None where no process of ours serves the disk."""
    nics: tuple[DeviceConnection | None, ...]
    """None where no process of ours moves the frames."""

    @classmethod
    def from_fds(cls, spec: VmSpec, fds: Sequence[int]) -> Self:
        """Return what `flattened` made the descriptors of; as many as there are processes."""
        pairs = iter([DeviceConnection(*pair) for pair in zip(fds[::2], fds[1::2], strict=True)])
        return cls(
            tuple(next(pairs) if disk.has_process else None for disk in spec.disks),
            tuple(next(pairs) if nic.has_process else None for nic in spec.interfaces),
        )


def flattened(connections: Iterable[DeviceConnection]) -> list[int]:
    """Return the descriptors of connections, disks before interfaces."""
    return [fd for pair in connections for fd in pair]
