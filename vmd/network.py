"""One interface of a VM, as the parent hands it on to the VM's processes."""

import os
from typing import NamedTuple

from vmd.channel import Fds
from vmd.internal import AttachedTap, TapSpec

_VHOST_NET = "/dev/vhost-net"


class Network(NamedTuple):
    """An interface of a VM that there is; descriptors stay whose they are."""

    spec: TapSpec
    tap: AttachedTap
    queues: tuple[int, ...]
    """Descriptors of the tap."""
    may_vhost: bool
    """The kernel may move its frames."""


def open_vhosts(count: int) -> list[int]:
    """Open /dev/vhost-net so many times, for the caller to close; nothing where there is none."""
    fds: list[int] = []
    try:
        fds.extend(os.open(_VHOST_NET, os.O_RDWR | os.O_CLOEXEC) for _ in range(count))
    except OSError:
        Fds(fds).close()
        return []
    return fds
