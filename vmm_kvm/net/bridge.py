"""A new tap on a bridge of the host, for users who may make one.

The tap is there as long as its descriptor is open. Bridges are found, never made.

Source: Linux include/uapi/linux/{if,sockios}.h
"""

import fcntl
import os
import socket
import struct

from vmm_kvm.errors import SpecError
from vmm_kvm.net import abi
from vmm_kvm.net.tap import open_tap, tap_name

_TEMPLATE = "vmm%d"
_ifreq_int = struct.Struct("<16si20x")


def tap_on_bridge(bridge: str, queues: int, mtu: int) -> list[int]:
    """Make a tap that is up and a port of `bridge`; returns the descriptors of its queues.

    Raises:
        SpecError: there is no such bridge, or this user may not do so.
    """
    try:
        socket.if_nametoindex(bridge)
    except OSError:
        raise SpecError(f"{bridge}: no such bridge") from None
    fds = open_tap(_TEMPLATE, queues)
    try:
        name = tap_name(fds[0])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            _set_up(control, name, bridge, mtu)
    except OSError as err:
        for fd in fds:
            os.close(fd)
        raise SpecError(f"{bridge}: {err.strerror}") from err
    return fds


def _set_up(control: socket.socket, name: str, bridge: str, mtu: int) -> None:
    port = name.encode()
    fcntl.ioctl(control, abi.SIOCSIFMTU, _ifreq_int.pack(port, mtu))
    joined = _ifreq_int.pack(bridge.encode(), socket.if_nametoindex(name))
    fcntl.ioctl(control, abi.SIOCBRADDIF, joined)
    found = fcntl.ioctl(control, abi.SIOCGIFFLAGS, abi.ifreq.pack(port, 0))
    flags = abi.ifreq.unpack(found)[1]
    fcntl.ioctl(control, abi.SIOCSIFFLAGS, abi.ifreq.pack(port, flags | abi.IFF_UP))
