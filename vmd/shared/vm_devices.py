"""The descriptors that connect a VM's process and those of its devices."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

from vmd.wire.internal import VmSpec


class DeviceConnection(NamedTuple):
    """The VM's side of a device process; the holder owns the descriptors."""

    counters: int
    """Memory for its counts of transfers; see `counters`."""
    socket: int
    """To the device process, by vhost-user."""
    status: int
    """Reads a byte 0 when the device process is ready, or else the reason why it cannot be."""


class Connections(NamedTuple):
    """A VM's connections to its device processes, in the order of its devices."""

    disks: tuple[DeviceConnection | None, ...]
    """None if no process of ours serves the disk."""
    nics: tuple[DeviceConnection | None, ...]
    """None if no process of ours moves the frames."""

    @classmethod
    def from_fds(cls, spec: VmSpec, fds: Sequence[int]) -> Self:
        """Return what `flattened` made the descriptors of; as many as there are processes."""
        triples = zip(fds[::3], fds[1::3], fds[2::3], strict=True)
        each = iter([DeviceConnection(*triple) for triple in triples])
        return cls(
            tuple(next(each) if disk.has_process else None for disk in spec.disks),
            tuple(next(each) if nic.has_process else None for nic in spec.interfaces),
        )


def flattened(connections: Iterable[DeviceConnection]) -> list[int]:
    """Return the descriptors of connections, disks before interfaces."""
    return [fd for one in connections for fd in one]
