"""The disks of a VM that go where it goes: copied by their processes.

Into a snapshot they are copied while the VM is paused; to another host while it runs, with what
changes meanwhile, and the rest while it is paused.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, Self

from vmd.config.disks import DiskKind, writes_image
from vmd.wire.internal import VmSpec
from vmm_kvm.block.changes import PIECE, ZEROS_MAX
from vmm_kvm.errors import SnapshotError
from vmm_kvm.memfd import make_scratch
from vmm_kvm.snapshot.manifest import Manifest
from vmm_kvm.snapshot.storage import StorageWriter
from vmm_kvm.virtio.vhost_user.messages import COPY_MAX, ImageCopy, VhostUserError

if TYPE_CHECKING:
    from vmm_kvm.machine.machine import Machine
    from vmm_kvm.virtio.vhost_user.frontend import VhostUser

_KEEP_ALIVE_S = 5.0


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


def movable_disks(machine: "Machine", spec: VmSpec) -> dict[int, "VhostUser"]:
    """Return the disks that can be copied to another host, by their places."""
    remote = (at for at, disk in enumerate(spec.disks) if disk.option.kind is not DiskKind.PMEM)
    found = zip(remote, machine.remote_disks, strict=True)
    ours = {DiskKind.PROBE, DiskKind.RAW, DiskKind.QCOW2}
    return {at: device for at, device in found if spec.disks[at].option.kind in ours}


class DiskMirror:
    """Disks that are copied to another host: a `precopy.Storage`; a context manager.

    Inside, their processes mark what changes.
    """

    def __init__(
        self,
        disks: Mapping[int, "VhostUser"],
        writer: StorageWriter,
        keep_alive: Callable[[], None],
        on_progress: Callable[[int, int], None],
    ) -> None:
        """Copy these disks, by their places, into `writer`.

        `keep_alive` writes something else now and then, for a reader that has use for no disks.
        `on_progress` is told how many bytes of all are written, now and then.
        """
        self._disks, self._writer = disks, writer
        self._left = {place: device.disk_size for place, device in disks.items()}
        self._size, self._done = sum(self._left.values()), 0
        self._keep_alive, self._on_progress = keep_alive, on_progress
        self._kept_alive = time.monotonic()
        self._memory = -1

    def __enter__(self) -> Self:
        """Begin.

        Raises:
            OSError: the host has no memory left.
            VhostUserError: a disk's process is gone.
        """
        self._memory = make_scratch("disk")
        try:
            for device in self._disks.values():
                device.log_changes(is_on=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._memory)
        for device in self._disks.values():
            with suppress(VhostUserError):  # it has failed, as the machine knows by now
                device.log_changes(is_on=False)

    @property
    def written(self) -> int:
        """Bytes, so far."""
        return self._writer.written

    def find(self) -> int:
        """Return how many bytes of disks are to be copied now.

        Raises:
            SnapshotError, OSError, VhostUserError: as `copy`.
        """
        for place, left in self._left.items():
            if not left:
                self._copy_next(place)  # which tells
        return sum(self._left.values())

    def copy(self, size: int) -> None:
        """Copy about `size` bytes of them.

        Raises:
            SnapshotError, OSError: they cannot be copied.
            VhostUserError: a disk's process is gone.
        """
        for place in self._disks:
            while size > 0 and self._left[place]:
                size -= self._copy_next(place)
            if size <= 0:
                return

    def _copy_next(self, place: int) -> int:
        device = self._disks[place]
        change = device.copy_changes(self._memory)
        most = ZEROS_MAX if change.is_zero else PIECE
        if change.size > most or change.start + change.size > device.disk_size:
            raise SnapshotError(f"disk {place}: its process says something else than it copied")
        if change.is_zero:
            self._writer.write_zeros(place, change.start, change.size)
        elif change.size:
            data = os.pread(self._memory, change.size, 0)
            self._writer.write_data(place, change.start, data)
        self._left[place] = change.left
        self._done += change.size
        now = time.monotonic()
        if now > self._kept_alive + _KEEP_ALIVE_S:
            self._kept_alive = now
            self._keep_alive()
            self._on_progress(self._done, self._size)
        return change.size

    def finish(self) -> None:
        """Copy the rest, of disks that nobody uses now, and write that this was all.

        Raises:
            SnapshotError, OSError, VhostUserError: as `copy`.
        """
        for place in self._disks:
            while self._copy_next(place):
                pass
        self._writer.finish_disks()


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
