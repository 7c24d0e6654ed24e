"""A disk's process: it serves one image to one VM, and has nothing else.

It ends when the VM's process does, having written back what it holds.
"""

import math
import os
import socket
from collections.abc import Callable

from vmd.config.disks import DiskKind, DiskOption, OnError, writes_image
from vmd.confine.confinements import Kind
from vmd.device import process as device_process
from vmd.shared.counters import CountedImage, Counters
from vmd.shared.late_locks import lock_when_free
from vmd.wire.channel import Fds
from vmd.wire.device import BeginDisk, DeviceBegin
from vmd.wire.internal import DiskSpec
from vmm_kvm.block.image import Format, Layer, StoredImage
from vmm_kvm.errors import VmmError
from vmm_kvm.images.create import open_overlay
from vmm_kvm.images.opening import open_image
from vmm_kvm.log import Log
from vmm_kvm.snapshot.generations import Generation
from vmm_kvm.virtio.blk import VirtioBlk

log = Log(__name__)


def prepare(_rehearses: bool) -> None:
    """Confine this process, which is to serve a disk; it does not rehearse."""
    device_process.prepare("disk", Kind.DISK)


def run(connection: socket.socket) -> int:
    """Receive the disk to serve from `connection`, and serve it; returns the exit status."""
    return device_process.run("disk", connection, make)


class _Watch:
    """Notes in which state the file of an image is."""

    def __init__(self, counters: Counters, fd: int) -> None:
        self._counters = counters
        self._fd = os.dup(fd)

    def note(self, *, is_found: bool = False) -> None:
        self._counters.set_generation(Generation.of(self._fd), is_found=is_found)

    def close(self) -> None:
        os.close(self._fd)


class _Disk(VirtioBlk):
    """A disk whose image is complete whenever no queue of it is served."""

    __slots__ = ("_settled", "_watch")

    def __init__(self, image: CountedImage, watch: _Watch, option: DiskOption) -> None:
        super().__init__(
            image,
            name=option.path,
            serial=option.serial,
            queues=option.queues,
            stops_at_errors=option.on_error is not OnError.REPORT,
        )
        self._settled = image
        self._watch = watch

    def reset(self) -> None:
        """Write what is held back: whoever writes the VM down looks at the image now."""
        super().reset()
        try:
            self._settled.flush()
        except OSError as err:
            log.warning("flush: %s", err.strerror)
        self._watch.note()

    def close(self) -> None:
        """Close the image."""
        super().close()
        self._watch.close()


def make(begin: DeviceBegin, fds: list[int], is_needed: Callable[[], bool]) -> VirtioBlk:
    """Return the device of vmm's message; see `process.Make`."""
    if not isinstance(begin, BeginDisk):
        Fds(fds).close()
        raise VmmError(f"{begin.device} is no disk")
    disk, option = begin.disk, begin.disk.option
    *chain, counters_fd = fds
    scratch = None if disk.scratch is None else chain.pop()
    counters = Counters(counters_fd)
    if not disk.is_locked:
        # Before it is locked, its last user may still change it.
        writes = writes_image(option)
        lock_when_free(
            chain[0], option.path, writes=writes, is_needed=is_needed, patience_s=math.inf
        )
    watch = _Watch(counters, chain[0])
    try:
        watch.note(is_found=True)
        image = _open(disk, chain, scratch)
    except BaseException:
        watch.close()
        raise
    watch.note()
    return _Disk(CountedImage(image, counters), watch, option)


def _open(disk: DiskSpec, chain: list[int], scratch: int | None) -> StoredImage:
    option = disk.option
    formats = [Format(kind) for kind in disk.formats]
    bases = [Layer(*base) for base in zip(chain[1:], formats[1:], strict=True)]
    # A disk without a configured format is probed again: its guest must not turn it into another.
    said = None if option.kind is DiskKind.PROBE else formats[0]
    if scratch is None:
        return open_image(chain[0], said, option.is_read_only, name=option.path, bases=bases)
    return open_overlay(scratch, [Layer(chain[0], formats[0]), *bases], option.path)
