"""One ring of a vhost-user server: the front-end's settings, and its queue.

Source: QEMU docs/interop/vhost-user, "Ring states".
"""

import os
import stat
import struct

from vmm_kvm.virtio.chain import Memory
from vmm_kvm.virtio.queue import SIZE_MAX, Ring, Virtqueue
from vmm_kvm.virtio.vhost_user.messages import VRING_LOG, VhostUserError, VringAddress
from vmm_kvm.virtio.vhost_user.regions import Regions

INDEX_MAX = 0xFFFF
_EVENT_SIZE = 8
_EVENT = struct.pack("<Q", 1)
_USED_INDEX_OFFSET, _USED_INDEX_SIZE = 2, 2


class Vring:
    """A ring of one connection; owns its descriptors.

    It is stopped without a `kick_fd` and unless it `is_polled`. Only a ring that is started and
    enabled has a `queue`, and only while all of it lies in guest memory.
    """

    __slots__ = (
        "_address",
        "_base",
        "_next_used",
        "_size",
        "call_fd",
        "error_fd",
        "halt_errno",
        "index",
        "is_enabled",
        "is_failed",
        "is_polled",
        "kick_fd",
        "queue",
    )

    def __init__(self, index: int) -> None:
        """Begin stopped and disabled, as ring `index`."""
        self.index = index
        self.kick_fd: int | None = None
        self.call_fd: int | None = None
        self.error_fd: int | None = None
        self.queue: Virtqueue | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything but the descriptors: stopped, disabled, without size and place."""
        self.is_enabled = False
        self.is_polled = False
        self.is_failed = False
        """The driver broke it: it is not served before it is started again."""
        self.halt_errno = 0
        """The errno of the host's fault that a request of the ring waits for; 0 for none."""
        self.queue = None
        self._size = 0
        self._base = 0
        self._address: VringAddress | None = None
        self._next_used: int | None = None

    def close(self) -> None:
        """Forget everything, and close the descriptors, which are not watched any more."""
        self.reset()
        self.kick_fd = _replaced(self.kick_fd, None)
        self.call_fd = _replaced(self.call_fd, None)
        self.error_fd = _replaced(self.error_fd, None)

    @property
    def is_started(self) -> bool:
        """Whether the ring may be served, if it is enabled too."""
        return self.kick_fd is not None or self.is_polled

    # The front-end's settings; VhostUserError for impossible ones

    def set_size(self, size: int) -> None:
        """Set the number of descriptors of a stopped ring."""
        self._must_be_stopped()
        if not 0 < size <= SIZE_MAX or size & (size - 1):
            raise VhostUserError(f"ring {self.index}: size {size}")
        self._size = size

    def set_base(self, base: int) -> None:
        """Set a stopped ring's next position in the available ring, 0 to 65535."""
        self._must_be_stopped()
        if base > INDEX_MAX:
            raise VhostUserError(f"ring {self.index}: base {base:#x}")
        self._base = base
        self._next_used = None

    def set_address(self, address: VringAddress) -> None:
        """Set where the ring lies; also while it is started."""
        if address.flags & ~VRING_LOG:  # writes to rings are marked anyway
            raise VhostUserError(f"ring {self.index}: flags {address.flags:#x}: not offered")
        self.suspend()
        self._address = address

    def set_call(self, fd: int | None) -> None:
        """Take ownership of the descriptor that interrupts the driver; None: it polls."""
        self.call_fd = _replaced(self.call_fd, fd)

    def set_error(self, fd: int | None) -> None:
        """Take ownership of the descriptor that tells the front-end of a failure."""
        self.error_fd = _replaced(self.error_fd, fd)

    def set_kick(self, fd: int | None) -> None:
        """Take ownership of the descriptor by which the driver notifies; start, or None: stop."""
        self.kick_fd = _replaced(self.kick_fd, fd)
        self.is_polled = False
        self.is_failed = False

    def set_polled(self) -> None:
        """Start the ring without notifications: its owner polls it."""
        self.set_kick(None)
        self.is_polled = True

    def _must_be_stopped(self) -> None:
        if self.is_started:
            raise VhostUserError(f"ring {self.index}: is not stopped")

    # The queue

    def resume(self, regions: Regions, features: int) -> None:
        """Make the queue in the memory that there is now, where the ring was suspended.

        Raises:
            VhostUserError: the ring has no size or place yet, or not in this memory.
            GuestError: the driver put it where no ring can be.
        """
        address = self._address
        if address is None or not self._size:
            raise VhostUserError(f"ring {self.index}: started without a size and an address")
        ring = Ring(
            self._size,
            regions.guest_address(address.descriptor),
            regions.guest_address(address.available),
            regions.guest_address(address.used),
        )
        next_used = _used_index(regions, ring) if self._next_used is None else self._next_used
        self.queue = Virtqueue(
            regions, ring, features, next_available=self._base, next_used=next_used
        )

    def is_in(self, regions: Regions) -> bool:
        """Tell whether the ring has a place, and it begins in this memory."""
        address = self._address
        return address is not None and all(
            regions.has_user_address(part)
            for part in (address.descriptor, address.available, address.used)
        )

    def suspend(self) -> None:
        """Drop the queue and remember where it was."""
        if self.queue is not None:
            # Chains that the device did not give back are taken again.
            self._base = self._next_used = self.queue.next_used
            self.queue = None

    def stop(self) -> int:
        """Stop the ring; returns a successor's position in the available ring."""
        self.suspend()
        self.set_kick(None)
        self._next_used = None
        return self._base

    # Events

    def take_kick(self) -> bool:
        """Forget the driver's notifications; returns whether there were any.

        Raises:
            VhostUserError: the descriptor is no eventfd or pipe, or its other end is closed.
        """
        assert self.kick_fd is not None
        try:
            data = os.read(self.kick_fd, _EVENT_SIZE)
        except BlockingIOError:
            return False
        except OSError as err:
            raise VhostUserError(f"ring {self.index}: kick descriptor: {err.strerror}") from err
        if len(data) != _EVENT_SIZE:
            raise VhostUserError(f"ring {self.index}: kick descriptor: {len(data)} bytes, not 8")
        return True

    def interrupt(self) -> None:
        """Tell the driver that there are used chains; raises VhostUserError if that is broken."""
        self._signal(self.call_fd, "call")

    def halt(self, errno: int) -> None:
        """Stop serving the ring until the next notification, because of a fault of the host."""
        self.halt_errno = errno
        self._signal(self.error_fd, "error")

    def fail(self) -> None:
        """Stop serving the ring, because of the driver, and tell the front-end."""
        self.suspend()
        self.is_failed = True
        self._signal(self.error_fd, "error")

    def _signal(self, fd: int | None, name: str) -> None:
        if fd is None:
            return
        try:
            os.write(fd, _EVENT)
        except BlockingIOError:  # many are pending: one more tells nothing new
            return
        except OSError as err:
            raise VhostUserError(f"ring {self.index}: {name} descriptor: {err.strerror}") from err


def prepare_event(fd: int) -> None:
    """Let a received descriptor not block, if it is an eventfd or a pipe; it stays the caller's.

    Raises:
        VhostUserError: it is something else.
    """
    # An eventfd has an inode of no type.
    if stat.S_IFMT(os.fstat(fd).st_mode) not in {0, stat.S_IFIFO}:
        raise VhostUserError("a descriptor that is neither an eventfd nor a pipe")
    os.set_blocking(fd, False)


def _replaced(fd: int | None, successor: int | None) -> int | None:
    if fd is not None:
        os.close(fd)
    return successor


def _used_index(memory: Memory, ring: Ring) -> int:
    """Return how many chains were given back before this server, as the used ring says."""
    view = memory.view(ring.used + _USED_INDEX_OFFSET, _USED_INDEX_SIZE)
    return int.from_bytes(view, "little")
