"""A disk's process: it serves one image to one VM, and has nothing else.

It ends when the VM's process does, having written back what it holds.
"""

import socket

from vmd import device_process
from vmd.confinements import Kind
from vmd.counters import CountedImage, Counters
from vmd.internal import BeginDisk, VmmToDevice
from vmm_kvm.block.image import Format, Layer, open_image
from vmm_kvm.errors import VmmError
from vmm_kvm.virtio.blk import VirtioBlk


def run(connection: socket.socket, _rehearses: bool) -> int:
    """Be told by `connection` which disk to serve, and serve it; returns the exit status."""
    return device_process.run("disk", Kind.DEVICE, connection, _make)


def _make(begin: VmmToDevice, fds: list[int]) -> VirtioBlk:
    if not isinstance(begin, BeginDisk):
        raise VmmError(f"{begin.device} is no disk")
    disk, option = begin.disk, begin.disk.option
    *chain, counters = fds
    layers = [Layer(fd, Format(kind)) for fd, kind in zip(chain, disk.formats, strict=True)]
    image = open_image(*layers[0], option.is_read_only, name=option.path, bases=layers[1:])
    counted = CountedImage(image, Counters(counters))
    return VirtioBlk(counted, name=option.path, serial=option.serial, queues=option.queues)
