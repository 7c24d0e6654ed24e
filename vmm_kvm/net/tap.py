"""A tap: the queues of an interface of the host whose cable ends here.

Frames have a virtio_net_hdr of 12 bytes in front, so that checksums and large segments pass as they
are: the host's network card, or the receiver, does what is left to do. The kernel checks what the
header says.

Source: Linux Documentation/networking/tuntap.rst; include/uapi/linux/if_tun.h
"""

import errno
import fcntl
import os
import struct
from collections.abc import Sequence

from vmm_kvm.errors import SpecError
from vmm_kvm.limits import INTERFACE_NAME_MAX
from vmm_kvm.net import abi
from vmm_kvm.net.ethernet import BROADCAST, Filter

HEADER_SIZE = 12
_DEVICE = "/dev/net/tun"
_EXACT_MAX = 8  # of FLT_EXACT_COUNT: addresses that the kernel compares in full
_NEEDED = abi.IFF_TAP | abi.IFF_NO_PI | abi.IFF_VNET_HDR


class Tap:
    """A tap whose queues are open, one descriptor each; they stay the caller's.

    One thread, apart from the kernel: while vhost-net serves a queue, nothing else reads or writes
    it.
    """

    has_filter = True
    """The kernel filters by destination; the device need not."""

    def __init__(self, fds: Sequence[int], name: str) -> None:
        """Prepare the queues: no waiting, headers of 12 bytes, no offload; `name` is for messages.

        Raises:
            SpecError: a descriptor is not a tap's, or has no header.
        """
        self.fds = tuple(fds)
        self.name = name
        for fd in self.fds:
            _check(fd, name)
            os.set_blocking(fd, False)
            fcntl.ioctl(fd, abi.TUNSETVNETHDRSZ, struct.pack("<i", HEADER_SIZE))
        self.offloads = _possible(self.fds[0])
        """Offloads that frames to us may use (TUN_F_*), of those that this kernel knows."""
        self.set_offloads(0)

    def close(self) -> None:
        """Leave the tap as it was found: every queue attached, nothing filtered, no offload."""
        try:
            self.set_queues(len(self.fds))
            self.set_filter(None)
            self.set_offloads(0)
        except OSError:  # the interface is gone, which is as well
            return

    def set_offloads(self, offloads: int) -> None:
        """Take frames that lack a checksum or are too long, as far as `offloads` (TUN_F_*) says.

        Raises:
            OSError: the interface is gone.
        """
        fcntl.ioctl(self.fds[0], abi.TUNSETOFFLOAD, offloads)

    def set_queues(self, count: int) -> None:
        """Let the first `count` queues have frames; the others, none.

        Raises:
            OSError: the interface is gone.
        """
        if len(self.fds) == 1:
            return
        for index, fd in enumerate(self.fds):
            flags = abi.IFF_ATTACH_QUEUE if index < count else abi.IFF_DETACH_QUEUE
            try:
                fcntl.ioctl(fd, abi.TUNSETQUEUE, abi.ifreq.pack(b"", flags))
            except OSError as err:
                if err.errno != errno.EINVAL:  # it is so already
                    raise

    def set_filter(self, wanted: Filter | None) -> None:
        """Have the kernel drop frames that `wanted` does not accept, as far as it can; None: none.

        VLANs, and what a station explicitly does not want, get through; a longer list of addresses
        than the kernel compares lets everything through.

        Raises:
            OSError: the interface is gone.
        """
        fcntl.ioctl(self.fds[0], abi.TUNSETTXFILTER, pack_filter(wanted))

    def receive(self, queue: int, buffers: Sequence[memoryview]) -> int:
        """Read the next frame of a queue, its header first; returns its bytes, 0 if there is none.

        Bytes that do not fit into the buffers are lost.
        """
        try:
            return os.readv(self.fds[queue], buffers)
        except OSError:  # none (EAGAIN), or the interface is gone, which its owner knows
            return 0

    def send(self, queue: int, buffers: Sequence[memoryview | bytes]) -> bool:
        """Write a frame, its header first; returns False where the kernel does not take it."""
        try:
            os.writev(self.fds[queue], buffers)
        except OSError:  # a header that makes no sense, an interface that is down or gone
            return False
        return True


def open_tap(name: str, queues: int = 1) -> list[int]:
    """Open the queues of a tap that exists, or make one, where that is allowed; returns them.

    `%d` in the name of a new one becomes the first number that is free.

    Raises:
        SpecError: there is no such tap, it is busy, or not ours; or this host has no taps.
    """
    encoded = name.encode()
    if not 0 < len(encoded) <= INTERFACE_NAME_MAX or b"/" in encoded:
        raise SpecError(f"{name}: not the name of an interface")
    flags = _NEEDED | (abi.IFF_MULTI_QUEUE if queues > 1 else 0)
    fds: list[int] = []
    try:
        for _ in range(queues):
            fds.append(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
            request = abi.ifreq.pack(encoded, flags)
            encoded = abi.ifreq.unpack(fcntl.ioctl(fds[-1], abi.TUNSETIFF, request))[0]
    except OSError as err:
        for fd in fds:
            os.close(fd)
        what = name if fds else _DEVICE
        raise SpecError(f"{what}: {err.strerror}") from err
    return fds


def tap_name(fd: int) -> str:
    """Return the name of the interface that a tap's queue belongs to; raises OSError."""
    found = fcntl.ioctl(fd, abi.TUNGETIFF, bytes(abi.ifreq.size))
    name: bytes = abi.ifreq.unpack(found)[0]
    return name.rstrip(b"\0").decode()


def pack_filter(wanted: Filter | None) -> bytes:
    """Return the tun_filter that comes closest to `wanted`, and drops nothing that it accepts."""
    everything = abi.tun_filter.pack(0, 0)
    if wanted is None or wanted.is_promiscuous or wanted.has_all_unicast:
        return everything
    own = [] if wanted.has_no_unicast else [wanted.lladdr, *sorted(wanted.unicast)]
    group = sorted(wanted.group)
    if not wanted.has_no_broadcast:
        own.append(BROADCAST)
    if not own or len(own) > _EXACT_MAX:
        return everything
    flags = 0
    if wanted.has_all_group:
        flags, group = abi.TUN_FLT_ALLMULTI, []
    addresses = [*own, *group]
    return abi.tun_filter.pack(flags, len(addresses)) + b"".join(addresses)


def _check(fd: int, name: str) -> None:
    try:
        found = fcntl.ioctl(fd, abi.TUNGETIFF, bytes(abi.ifreq.size))
    except OSError as err:
        raise SpecError(f"{name}: descriptor {fd}: not a tap: {err.strerror}") from err
    flags = abi.ifreq.unpack(found)[1]
    if flags & _NEEDED != _NEEDED:
        raise SpecError(
            f"{name}: descriptor {fd}: a tap without header, or with another: {flags:#x}"
        )


def _possible(fd: int) -> int:
    """Return which offloads this kernel's taps know."""
    base = abi.TUN_F_CSUM | abi.TUN_F_TSO4 | abi.TUN_F_TSO6 | abi.TUN_F_TSO_ECN | abi.TUN_F_UFO
    for offloads in (base | abi.TUN_F_USO4 | abi.TUN_F_USO6, base, base & ~abi.TUN_F_UFO):
        try:
            fcntl.ioctl(fd, abi.TUNSETOFFLOAD, offloads)
        except OSError:  # EINVAL: an older kernel
            continue
        return offloads
    return 0
