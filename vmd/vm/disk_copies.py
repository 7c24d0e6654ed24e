"""The disks of a VM that go into its snapshot, copied by their processes while it is paused."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmd.config.disks import DiskKind, writes_image
from vmd.wire.internal import VmSpec
from vmm_kvm.snapshot.manifest import Manifest
from vmm_kvm.virtio.vhost_user.messages import COPY_MAX, ImageCopy

if TYPE_CHECKING:
    from vmm_kvm.machine.machine import Machine
    from vmm_kvm.virtio.vhost_user.frontend import VhostUser


class KeptDisk(NamedTuple):
    """A disk that goes into a snapshot."""

    place: int
    """Among all disks."""
    device: "VhostUser"

    @property
    def size(self) -> int:
        """Bytes."""
        return self.device.disk_size


def kept_disks(machine: "Machine", spec: VmSpec) -> tuple[KeptDisk, ...]:
    """Return the disks that a VM writes, all of which have a process of ours."""
    remote = (at for at, disk in enumerate(spec.disks) if disk.option.kind is not DiskKind.PMEM)
    found = (KeptDisk(*each) for each in zip(remote, machine.remote_disks, strict=True))
    return tuple(disk for disk in found if writes_image(spec.disks[disk.place].option))


def copies(kept: Sequence[KeptDisk], offsets: Sequence[int], fd: int) -> Iterator[None]:
    """Copy disks to these places of a file, a part at each step.

    Raises:
        OSError: a disk cannot be read, or the file cannot be written.
        VhostUserError: a disk's process is gone.
    """
    for disk, offset in zip(kept, offsets, strict=True):
        for start in range(0, disk.size, COPY_MAX):
            part = ImageCopy(start, min(COPY_MAX, disk.size - start), offset + start)
            disk.device.copy_image(fd, part)
            yield


def with_kept(manifest: Manifest, kept: Sequence[KeptDisk], offsets: Sequence[int]) -> Manifest:
    """Return a manifest that says where the disks are."""
    if not kept:
        return manifest
    places = {disk.place: (offset, disk.size) for disk, offset in zip(kept, offsets, strict=True)}
    return manifest._replace(kept=tuple(places.get(at) for at in range(len(manifest.disks))))
