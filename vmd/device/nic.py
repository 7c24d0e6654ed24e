"""An interface's process: it moves frames between one VM and one tap, and has nothing else.

It is there only where vhost-net is not, and ends when the VM's process does.
"""

import os
import socket
from collections.abc import Callable

from vmd.confine.confinements import Kind
from vmd.device import process as device_process
from vmd.wire.blank import Preparation
from vmd.wire.channel import Fds
from vmd.wire.device import BeginNic, DeviceBegin
from vmm_kvm.errors import VmmError
from vmm_kvm.net.ethernet import parse_lladdr
from vmm_kvm.net.tap import Tap
from vmm_kvm.virtio.net import VirtioNet


def prepare(_preparation: Preparation) -> None:
    """Confine this process, which is to serve an interface; it does not rehearse."""
    device_process.prepare("nic", Kind.NIC)


def run(connection: socket.socket) -> int:
    """Receive the interface to serve from `connection`, and serve it; returns the exit status."""
    return device_process.run("nic", connection, make)


def make(begin: DeviceBegin, fds: list[int], _is_needed: Callable[[], bool]) -> VirtioNet:
    """Return the device of vmm's message; see `process.Make`."""
    if not isinstance(begin, BeginNic):
        Fds(fds).close()
        raise VmmError(f"{begin.device} is no interface")
    nic = begin.nic
    *taps, counters = fds
    os.close(counters)  # nothing here counts yet
    try:
        tap = Tap(taps, nic.name)
    except (VmmError, OSError):
        Fds(taps).close()
        raise
    return VirtioNet(
        tap,
        parse_lladdr(nic.lladdr),
        name=nic.name,
        mtu=nic.mtu,
        is_locked=nic.config.is_locked,
    )
