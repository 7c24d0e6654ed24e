"""The service manager's protocol: readiness, watchdog, a listening socket.

Source: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).
"""

import os
import socket
from collections.abc import Mapping

from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop

log = Log(__name__)

_LISTEN_FDS_START = 3
_MICROSECONDS = 1000  # nanoseconds each


class ServiceError(Exception):
    """A descriptor of the service manager is unusable; one line."""


class Notifier:
    """Speaks to the service manager, if there is one."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Find the service manager's socket in the environment."""
        path = environ.get("NOTIFY_SOCKET", "")
        # An abstract address is written with an @.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._watchdog_ns = _watchdog_ns(environ)

    def notify(self, state: str) -> None:
        """Send lines such as `READY=1`; nothing happens without a service manager."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.sendto(state.encode(), self._address)
            except OSError as err:
                log.warning("service manager: %s", err.strerror)

    def keep_alive(self, loop: EventLoop) -> None:
        """Ping the watchdog from `loop`, twice in each of its intervals."""
        if self._watchdog_ns is None:
            return
        interval_ns = self._watchdog_ns // 2

        def tell() -> None:
            self.notify("WATCHDOG=1")
            timer.arm(loop.monotonic_ns() + interval_ns)

        timer = loop.timer(tell)
        tell()


def _watchdog_ns(environ: Mapping[str, str]) -> int | None:
    microseconds = environ.get("WATCHDOG_USEC", "")
    pid = environ.get("WATCHDOG_PID", str(os.getpid()))
    if not microseconds.isdecimal() or pid != str(os.getpid()) or not int(microseconds):
        return None
    return min(int(microseconds) * _MICROSECONDS, 3600 * NANOSECONDS)


def inherited_socket(environ: Mapping[str, str]) -> socket.socket | None:
    """Return the service manager's listening socket, None if there is none.

    Raises:
        ServiceError: it is of another kind, or there is more than one.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = environ.get("LISTEN_FDS", "0")
    if count == "0":
        return None
    if count != "1":
        raise ServiceError(f"{count} sockets from the service manager, not one")
    try:
        sock = socket.socket(fileno=_LISTEN_FDS_START)
    except OSError as err:
        raise ServiceError(f"descriptor {_LISTEN_FDS_START}: {err.strerror}") from err
    is_listening = sock.family == socket.AF_UNIX and sock.type == socket.SOCK_SEQPACKET
    if not is_listening or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.detach()
        raise ServiceError(
            f"descriptor {_LISTEN_FDS_START}: not a listening sequential packet socket"
        )
    os.set_inheritable(_LISTEN_FDS_START, False)
    return sock
