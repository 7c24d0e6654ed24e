"""An interface's process: it moves frames between one VM and one tap, and has nothing else.

It is there only where vhost-net is not, and ends when the VM's process does.
"""

import os
import signal
import socket

from vmd import log as logging
from vmd.channel import Fds
from vmd.confinements import CONFINEMENTS, Kind
from vmd.internal import NicSpec
from vmd.sandbox import confine, set_title
from vmm_kvm.errors import VmmError
from vmm_kvm.log import Log
from vmm_kvm.net.tap import Tap
from vmm_kvm.virtio.net import VirtioNet
from vmm_kvm.virtio.vhost_user.process import serve

log = Log(__name__)

READY = b"\0"
"""What the status descriptor says when the interface can be used."""
STATUS_MAX = 4096
"""Bytes of what it says otherwise."""

_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def run(nic: NicSpec, vm: str, taps: Fds, connection: tuple[int, int, int]) -> int:
    """Serve until the connection ends; returns the exit status.

    `taps` are the tap's queues, `connection` are a socket, a pipe and counters; all are
    taken over.
    """
    for number in _IGNORED:  # it ends with the VM
        signal.signal(number, signal.SIG_IGN)
    set_title(f"nic/{vm}")
    confine(CONFINEMENTS[Kind.NIC], None)
    sock, status_fd, counters = connection
    os.close(counters)  # nothing here counts yet
    try:
        backend = VirtioNet(
            Tap(taps.take_all(), nic.name),
            bytes.fromhex(nic.lladdr.replace(":", "")),
            name=nic.name,
            mtu=nic.mtu,
            is_locked=nic.is_locked,
        )
    except (VmmError, OSError) as err:
        os.write(status_fd, str(err).encode()[:STATUS_MAX])
        return 0  # the VM process tells
    os.write(status_fd, READY)
    os.close(status_fd)
    logging.set_title(f"vm/{vm}: {nic.name}")
    serve(socket.socket(fileno=sock), backend)
    return 0
