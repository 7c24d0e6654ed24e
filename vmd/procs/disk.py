"""A disk's process: it serves one image to one VM, and has nothing else.

It ends when the VM's process does, having written back what it holds.
"""

import os
import signal
import socket

from vmd import log as logging
from vmd.channel import Fds
from vmd.confinements import CONFINEMENTS, Kind
from vmd.counters import CountedImage, Counters
from vmd.internal import DiskSpec
from vmd.sandbox import confine, set_title
from vmm_kvm.block.image import Format, Layer, open_image
from vmm_kvm.errors import VmmError
from vmm_kvm.log import Log
from vmm_kvm.virtio.blk import VirtioBlk
from vmm_kvm.virtio.vhost_user.process import serve

log = Log(__name__)

READY = b"\0"
"""What the status descriptor says when the disk can be used."""
STATUS_MAX = 4096
"""Bytes of what it says otherwise."""

_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def run(disk: DiskSpec, vm: str, chain: Fds, connection: tuple[int, int, int]) -> int:
    """Serve until the connection ends; returns the exit status.

    `chain` are the descriptors of the image and its bases, `connection` are a socket, a pipe,
    and counters; all are taken over.
    """
    for number in _IGNORED:  # whoever ends the VM wants its last writes on the disk
        signal.signal(number, signal.SIG_IGN)
    set_title(f"disk/{vm}")
    confine(CONFINEMENTS[Kind.DEVICE], None)
    sock, status_fd, counters = connection
    try:
        backend = _backend(disk, chain.take_all(), Counters(counters))
    except (VmmError, OSError) as err:
        os.write(status_fd, str(err).encode()[:STATUS_MAX])
        return 0  # the VM process tells
    os.write(status_fd, READY)
    os.close(status_fd)
    logging.set_title(f"vm/{vm}: {disk.option.path}")
    serve(socket.socket(fileno=sock), backend)
    return 0


def _backend(disk: DiskSpec, chain: list[int], counters: Counters) -> VirtioBlk:
    option = disk.option
    layers = [Layer(fd, Format(kind)) for fd, kind in zip(chain, disk.formats, strict=True)]
    image = open_image(*layers[0], option.is_read_only, name=option.path, bases=layers[1:])
    counted = CountedImage(image, counters)
    return VirtioBlk(counted, name=option.path, serial=option.serial, queues=option.queues)
