"""/dev/vhost-net: a thread of the kernel that serves the rings of a queue pair.

The kernel reads and writes this process's memory at the addresses that it is told, and checks that
they lie in it; it reports a ring that the guest broke through the error descriptor.

Source: Linux include/uapi/linux/vhost.h, drivers/vhost/{vhost,net}.c
"""

import errno
import fcntl
import struct
from collections.abc import Sequence
from typing import NamedTuple

from vmm_kvm.errors import SpecError
from vmm_kvm.net import abi

RECEIVE, TRANSMIT = 0, 1
"""The rings of a queue pair."""
LOG_ALL = 1 << 26
"""The feature with which the kernel marks what it writes (VHOST_F_LOG_ALL)."""

_NONE = -1
_U64 = struct.Struct("<Q")


class VhostRegion(NamedTuple):
    """A piece of guest memory, as it lies in this process."""

    gpa: int
    size: int
    """Bytes, a multiple of 4096 as the addresses are."""
    hva: int


class VhostRing(NamedTuple):
    """A ring of a queue pair: where its parts lie in this process, and its eventfds."""

    size: int
    descriptors: int
    available: int
    used: int
    kick_fd: int
    """The guest's notification."""
    call_fd: int
    """Written to interrupt the guest."""
    error_fd: int
    """Written when the ring is broken."""
    base: int = 0
    """The position in both rings, 0 to 65535."""


class VhostNet:
    """One descriptor of /dev/vhost-net, which stays the caller's: one queue pair."""

    def __init__(self, fd: int) -> None:
        """Take the pair for this process.

        Raises:
            SpecError: the descriptor is something else, or another process's already.
        """
        self._fd = fd
        try:
            fcntl.ioctl(fd, abi.VHOST_SET_OWNER)
        except OSError as err:
            # A reboot makes a new machine in the same process, which owns it already.
            if err.errno != errno.EBUSY:
                raise SpecError(f"descriptor {fd}: not of /dev/vhost-net: {err.strerror}") from err
        try:
            offered = fcntl.ioctl(fd, abi.VHOST_GET_FEATURES, bytes(_U64.size))
        except OSError as err:
            raise SpecError(f"descriptor {fd}: /dev/vhost-net: {err.strerror}") from err
        self.features: int = _U64.unpack(offered)[0]
        """The kernel's features, a mask of virtio features."""

    def set_up(self, features: int, regions: Sequence[VhostRegion]) -> None:
        """Tell the negotiated features and where guest memory lies; no ring is served.

        Raises:
            OSError: the kernel refuses.
        """
        fcntl.ioctl(self._fd, abi.VHOST_SET_FEATURES, _U64.pack(features))
        table = abi.vhost_memory.pack(len(regions), 0) + b"".join(
            abi.vhost_memory_region.pack(region.gpa, region.size, region.hva, 0)
            for region in regions
        )
        fcntl.ioctl(self._fd, abi.VHOST_SET_MEM_TABLE, table)

    def log_writes(self, features: int, log: int | None) -> None:
        """Have the kernel mark the pages that it writes to, or no more.

        It marks buffers of frames, after it has written them; not the used rings.

        Args:
            features: those of `set_up`.
            log: address, in this process, of a bit for each page of guest-physical memory, which
                is mapped until the kernel marks no more; None: it marks no more.

        Raises:
            OSError: the kernel refuses.
        """
        if log is not None:
            fcntl.ioctl(self._fd, abi.VHOST_SET_LOG_BASE, _U64.pack(log))
            features |= LOG_ALL
        fcntl.ioctl(self._fd, abi.VHOST_SET_FEATURES, _U64.pack(features))

    def start(self, index: int, ring: VhostRing, tap_fd: int) -> None:
        """Serve a ring, RECEIVE or TRANSMIT, with the frames of a tap's queue.

        Raises:
            OSError: the kernel refuses: the ring is not in guest memory, or the tap is none.
        """
        state, file = abi.vhost_vring_state, abi.vhost_vring_file
        for request, argument in (
            (abi.VHOST_SET_VRING_NUM, state.pack(index, ring.size)),
            (abi.VHOST_SET_VRING_BASE, state.pack(index, ring.base)),
            (
                abi.VHOST_SET_VRING_ADDR,
                abi.vhost_vring_addr.pack(
                    *(index, 0, ring.descriptors, ring.used, ring.available, 0)
                ),
            ),
            (abi.VHOST_SET_VRING_ERR, file.pack(index, ring.error_fd)),
            (abi.VHOST_SET_VRING_CALL, file.pack(index, ring.call_fd)),
            (abi.VHOST_SET_VRING_KICK, file.pack(index, ring.kick_fd)),
            (abi.VHOST_NET_SET_BACKEND, file.pack(index, tap_fd)),
        ):
            fcntl.ioctl(self._fd, request, argument)

    def stop_ring(self, index: int) -> int:
        """Stop serving a ring; the kernel does not touch its memory any more when this returns.

        Returns its next position, 0 to 65535. Idempotent, after `set_up`. Raises OSError for
        what would be a bug.
        """
        for request in (
            abi.VHOST_NET_SET_BACKEND,
            abi.VHOST_SET_VRING_KICK,
            abi.VHOST_SET_VRING_CALL,
            abi.VHOST_SET_VRING_ERR,
        ):
            fcntl.ioctl(self._fd, request, abi.vhost_vring_file.pack(index, _NONE))
        asked = abi.vhost_vring_state.pack(index, 0)
        state = fcntl.ioctl(self._fd, abi.VHOST_GET_VRING_BASE, asked)
        base: int = abi.vhost_vring_state.unpack(state)[1]
        return base
