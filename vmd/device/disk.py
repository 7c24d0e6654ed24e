"""A disk's process: it serves one image to one VM, and has nothing else.

It ends when the VM's process does, after it has written back its data.
"""

import math
import os
import socket
from collections.abc import Callable, Sequence
from errno import EINVAL

from vmd.config.disks import DiskKind, OnError, writes_image
from vmd.confine.confinements import Kind
from vmd.device import process as device_process
from vmd.shared.counters import CountedImage, Counters
from vmd.shared.late_locks import lock_when_free
from vmd.wire.blank import Preparation
from vmd.wire.channel import Fds
from vmd.wire.device import BeginDisk, DeviceBegin
from vmd.wire.internal import DiskSpec
from vmm_kvm.block.changes import Change, ChangeLog, LoggedImage
from vmm_kvm.block.image import Format, Layer, StoredImage
from vmm_kvm.block.locks import lock, unlock
from vmm_kvm.errors import VmmError
from vmm_kvm.images.create import open_overlay
from vmm_kvm.images.opening import open_image
from vmm_kvm.log import Log
from vmm_kvm.snapshot.generations import Generation
from vmm_kvm.virtio.blk import VirtioBlk

log = Log(__name__)

_PIECE = 1 << 20


def prepare(_preparation: Preparation) -> None:
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

    __slots__ = ("_changes", "_counters", "_disk", "_is_lent", "_kept", "_settled", "_watch")

    def __init__(
        self,
        image: StoredImage,
        counters: Counters,
        watch: _Watch,
        disk: DiskSpec,
        kept: Sequence[int],
    ) -> None:
        """Serve an image; `kept` are descriptors of it and its bases, to open it again by."""
        option, counted = disk.option, CountedImage(image, counters)
        super().__init__(
            counted,
            name=option.path,
            serial=option.serial,
            queues=option.queues,
            stops_at_errors=option.on_error is not OnError.REPORT,
        )
        self._settled = counted
        self._changes: ChangeLog | None = None
        self._counters, self._watch, self._disk = counters, watch, disk
        self._kept = tuple(kept)
        self._is_lent = False

    def let_go(self) -> None:
        """Close the image, and let others lock it: the VM moves to another host."""
        if not self._is_lent:
            self._settled.flush()
            self._settled.close()
            self._is_lent = True
        for fd in self._kept:
            unlock(fd)

    def take_back(self) -> None:
        """Lock the image, if it is free, and read it again."""
        if self._is_lent:
            option = self._disk.option
            lock(self._kept[0], option.path, writes=writes_image(option))
            image = _open(self._disk, list(map(os.dup, self._kept)), None)
            self._settled = CountedImage(image, self._counters)
            self._serve_settled()
            self._is_lent = False

    def _serve_settled(self) -> None:
        """Serve the image, with its changes marked if they are wanted."""
        image, log = self._settled, self._changes
        self._image = LoggedImage(image, log) if log else image

    def reset(self) -> None:
        """Write what is held back: whoever writes the VM down looks at the image now."""
        super().reset()
        try:
            self._settled.flush()
        except OSError as err:
            log.warning("flush: %s", err.strerror)
        self._watch.note()

    def copy_image(self, fd: int, start: int, size: int, target: int) -> None:
        """Copy what the guest would read, `size` bytes from `start` on, to `target` in a file.

        Raises:
            OSError: the image cannot be read, or the file cannot be written.
        """
        image = self._settled
        for at in range(start, start + size, _PIECE):
            length = min(_PIECE, start + size - at)
            if image.reads_zero(at, length):
                continue
            data = bytearray(length)
            image.peek(at, [memoryview(data)])
            if data.count(0) != length:
                _write(fd, data, target + at - start)

    def log_changes(self, *, is_on: bool) -> None:
        """Mark all of the disk as changed, and then what changes; or do so no more."""
        self._changes = ChangeLog(self._settled.size) if is_on else None
        self._serve_settled()

    def copy_changes(self, fd: int) -> Change:
        """Copy what the guest would read in the next changed part to the beginning of a file.

        Raises:
            OSError: the image cannot be read, or the file cannot be written.
        """
        if self._changes is None:
            raise OSError(EINVAL, os.strerror(EINVAL))
        change = self._changes.take(self._settled)
        if change.is_zero or not change.size:
            return change
        try:
            data = bytearray(change.size)
            self._settled.peek(change.start, [memoryview(data)])
            _write(fd, data, 0)
        except OSError:
            self._changes.mark(change.start, change.size)
            raise
        return change

    def close(self) -> None:
        """Close the image."""
        super().close()
        self._watch.close()
        kept, self._kept = self._kept, ()
        for fd in kept:
            os.close(fd)


def _write(fd: int, data: bytearray, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def make(begin: DeviceBegin, fds: list[int], is_needed: Callable[[], bool]) -> VirtioBlk:
    """Return the device of vmm's message; see `process.Make`."""
    if not isinstance(begin, BeginDisk):
        Fds(fds).close()
        raise VmmError(f"{begin.device} is no disk")
    disk, option = begin.disk, begin.disk.option
    *chain, counters_fd = fds
    scratch = None if disk.scratch is None else chain.pop()
    if not disk.is_locked:
        # Before it is locked, its last user may still change it.
        writes = writes_image(option)
        lock_when_free(
            chain[0], option.path, writes=writes, is_needed=is_needed, patience_s=math.inf
        )
    counters = Counters(counters_fd)
    watch = _Watch(counters, chain[0])
    kept = list(map(os.dup, chain)) if scratch is None else []  # an overlay has no other user
    try:
        watch.note(is_found=True)
        image = _open(disk, chain, scratch)
    except BaseException:
        watch.close()
        Fds(kept).close()
        raise
    watch.note()
    return _Disk(image, counters, watch, disk, kept)


def _open(disk: DiskSpec, chain: list[int], scratch: int | None) -> StoredImage:
    option = disk.option
    formats = [Format(kind) for kind in disk.formats]
    bases = [Layer(*base) for base in zip(chain[1:], formats[1:], strict=True)]
    # A disk without a configured format is probed again: its guest must not turn it into another.
    said = None if option.kind is DiskKind.PROBE else formats[0]
    if scratch is None:
        return open_image(
            chain[0],
            said,
            option.is_read_only,
            name=option.path,
            bases=bases,
            window=option.window,
        )
    return open_overlay(scratch, [Layer(chain[0], formats[0], option.window), *bases], option.path)
