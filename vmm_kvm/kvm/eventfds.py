"""Event fds between a guest and its devices: notifications in, message-signalled interrupts out.

They take exits and the vCPUs' threads out of a request's path. Any thread.

Locks: `_lock` guards the routing table; a line's route is changed by one thread at a time.
"""

import errno
import os
import threading
from collections.abc import Iterable
from typing import Self

from vmm_kvm.errors import KvmError
from vmm_kvm.kvm.vm import MsiRoute, Route, Vm
from vmm_kvm.log import Log

log = Log(__name__)

# KVM's error for a message with an impossible address (EPERM is a bare -1 of its own code).
_GUEST_ERRORS = {errno.EPERM, errno.EINVAL}

_ANY_SIZE = 0
_EDGE = 1


class KvmMsiLine:
    """A message into the guest, sent by writing an eventfd.

    Writes while it has no message are counted; the next message is then sent once for all of them.
    """

    __slots__ = ("_eventfds", "_is_bound", "_message", "fd", "gsi")

    def __init__(self, eventfds: "EventFds", fd: int, gsi: int) -> None:
        """Use `fd`, an eventfd, and `gsi`; `EventFds.msi_line` calls this."""
        self.fd = fd
        self.gsi = gsi
        self._eventfds = eventfds
        self._message: tuple[int, int] | None = None
        self._is_bound = False

    def route(self, message: tuple[int, int] | None) -> None:
        """Send `message`, an address and data, from now on; None holds interrupts back.

        An impossible message is dropped.

        Raises:
            KvmError: the VM is closed, or has no more routes.
        """
        vm = self._eventfds.vm
        if message is None:
            if self._is_bound:
                self._is_bound = False
                vm.remove_irqfd(self.fd, self.gsi)
            return
        if message != self._message:
            try:
                self._eventfds.set_route(MsiRoute(self.gsi, *message))
            except KvmError as err:
                _dismiss(err, *message)
            self._message = message
        if not self._is_bound:
            vm.irqfd(self.fd, self.gsi)
            self._is_bound = True

    def signal(self) -> None:
        """Write the eventfd."""
        os.eventfd_write(self.fd, _EDGE)

    def is_pending(self) -> bool:
        """Tell whether it was written while it had no message; only this may read it then."""
        try:
            count = os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        os.eventfd_write(self.fd, count)
        return True

    def bind_again(self) -> None:
        """Bind the line again, in a VM that replaces the one before.

        Raises:
            KvmError: KVM refused.
        """
        if self._is_bound:
            self._eventfds.vm.irqfd(self.fd, self.gsi)

    def flush(self) -> None:
        """Return when every message that was sent has reached its vCPU's local APIC.

        Raises:
            KvmError: the VM is closed.
        """
        if self._is_bound:
            vm = self._eventfds.vm
            vm.remove_irqfd(self.fd, self.gsi)
            vm.irqfd(self.fd, self.gsi)


class EventFds:
    """The event fds of a VM and the routes of its interrupts; a context manager.

    Owns the eventfds of its lines; the VM stays the caller's, and has to outlive it.
    """

    def __init__(self, vm: Vm, routes: Iterable[Route], first_gsi: int) -> None:
        """Set `routes`, and use GSIs from `first_gsi` up for lines.

        Raises:
            KvmError: there is no irqchip, or a route is impossible.
        """
        self.vm = vm
        self._lock = threading.Lock()
        self._fixed = tuple(routes)
        self._messages: dict[int, MsiRoute] = {}
        self._next_gsi = first_gsi
        self._lines: list[KvmMsiLine] = []
        vm.set_gsi_routing(self._fixed)

    def close(self) -> None:
        """Close the lines' eventfds; KVM forgets them. Idempotent."""
        lines, self._lines = self._lines, []
        for line in lines:
            os.close(line.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def msi_line(self) -> KvmMsiLine:
        """Make a line without a message.

        Raises:
            OSError: the host has no descriptors left.
        """
        with self._lock:
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            gsi = self._next_gsi
            self._next_gsi += 1
            line = KvmMsiLine(self, fd, gsi)
            self._lines.append(line)
            return line

    def bind_again(self) -> None:
        """Set all routes and bind all lines again, in a VM that replaces the one before.

        Raises:
            KvmError: KVM refused.
        """
        self.vm.set_gsi_routing((*self._fixed, *self._messages.values()))
        for line in self._lines:
            line.bind_again()

    def flush(self) -> None:
        """Return when every message that was sent has reached its vCPU's local APIC.

        While nothing sends more, and before the local APICs are read.

        Raises:
            KvmError: the VM is closed.
        """
        for line in self._lines:
            line.flush()

    def set_route(self, route: MsiRoute) -> None:
        """Let a line's GSI send another message; called by the line.

        Raises:
            KvmError: there are no more routes.
        """
        with self._lock:
            routes = {**self._messages, route.gsi: route}
            self.vm.set_gsi_routing((*self._fixed, *routes.values()))
            self._messages = routes

    def send_msi(self, address: int, data: int) -> None:
        """Send a message now, without a line; an impossible one is dropped.

        Raises:
            KvmError: the VM is closed.
        """
        try:
            self.vm.signal_msi(address, data)
        except KvmError as err:
            _dismiss(err, address, data)

    def bind_notification(self, fd: int, port: int) -> None:
        """Let guest writes of any size to `port` signal the eventfd `fd`, instead of an exit.

        If KVM cannot, they stay exits.
        """
        try:
            self.vm.ioeventfd(fd, port, _ANY_SIZE, pio=True)
        except KvmError as err:
            log.debug("notifications by port %#x: %s", port, err)

    def unbind_notification(self, fd: int, port: int) -> None:
        """Undo `bind_notification`, called with the same arguments."""
        try:
            self.vm.remove_ioeventfd(fd, port, _ANY_SIZE, pio=True)
        except KvmError as err:
            log.debug("notifications by port %#x: %s", port, err)


def _dismiss(err: KvmError, address: int, data: int) -> None:
    """Pass over an error that is the guest's fault: it may name any address."""
    if err.errno not in _GUEST_ERRORS:
        raise err
    log.debug("MSI %#x to %#x: %s", data, address, err)
