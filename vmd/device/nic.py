"""An interface's process: it moves frames between one VM and one tap, and has nothing else.

It is there only where vhost-net is not, and ends when the VM's process does.
"""

import os
import socket

from vmd.confine.confinements import Kind
from vmd.device import process as device_process
from vmd.wire.internal import BeginNic, DeviceBegin
from vmm_kvm.errors import VmmError
from vmm_kvm.net.ethernet import parse_lladdr
from vmm_kvm.net.tap import Tap
from vmm_kvm.virtio.net import VirtioNet


def prepare(_rehearses: bool) -> None:
    """Confine this process, which is to serve an interface; it does not rehearse."""
    device_process.prepare("nic", Kind.NIC)


def run(connection: socket.socket) -> int:
    """Be told by `connection` which interface to serve, and serve it; returns the exit status."""
    return device_process.run("nic", connection, _make)


def _make(begin: DeviceBegin, fds: list[int]) -> VirtioNet:
    if not isinstance(begin, BeginNic):
        raise VmmError(f"{begin.device} is no interface")
    nic = begin.nic
    *taps, counters = fds
    os.close(counters)  # nothing here counts yet
    return VirtioNet(
        Tap(taps, nic.name),
        parse_lladdr(nic.lladdr),
        name=nic.name,
        mtu=nic.mtu,
        is_locked=nic.is_locked,
    )
