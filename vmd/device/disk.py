"""A disk's process: it serves one image to one VM, and has nothing else.

It ends when the VM's process does, having written back what it holds.
"""

import math
import socket
from collections.abc import Callable

from vmd.config.disks import DiskKind, OnError, writes_image
from vmd.confine.confinements import Kind
from vmd.device import process as device_process
from vmd.shared.counters import CountedImage, Counters
from vmd.shared.late_locks import lock_when_free
from vmd.wire.channel import Fds
from vmd.wire.device import BeginDisk, DeviceBegin
from vmm_kvm.block.image import Format, Layer
from vmm_kvm.errors import VmmError
from vmm_kvm.images.create import open_overlay
from vmm_kvm.images.opening import open_image
from vmm_kvm.virtio.blk import VirtioBlk


def prepare(_rehearses: bool) -> None:
    """Confine this process, which is to serve a disk; it does not rehearse."""
    device_process.prepare("disk", Kind.DISK)


def run(connection: socket.socket) -> int:
    """Receive the disk to serve from `connection`, and serve it; returns the exit status."""
    return device_process.run("disk", connection, make)


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
    formats = [Format(kind) for kind in disk.formats]
    bases = [Layer(*base) for base in zip(chain[1:], formats[1:], strict=True)]
    # A disk without a configured format is probed again: its guest must not turn it into another.
    said = None if option.kind is DiskKind.PROBE else formats[0]
    if scratch is None:
        image = open_image(chain[0], said, option.is_read_only, name=option.path, bases=bases)
    else:
        image = open_overlay(scratch, [Layer(chain[0], formats[0]), *bases], option.path)
    counted = CountedImage(image, counters)
    return VirtioBlk(
        counted,
        name=option.path,
        serial=option.serial,
        queues=option.queues,
        stops_at_errors=option.on_error is not OnError.REPORT,
    )
