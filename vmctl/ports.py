"""Streams to ports of guests, by their vsock devices: the handshake before the first byte."""

import socket
import time

_GREETING_MAX = 32


def await_guest(stream: socket.socket, timeout: float | None) -> None:
    """Read the line that confirms the guest's acceptance, and no byte more.

    Args:
        stream: to the port; it blocks afterwards.
        timeout: seconds; None waits as long as it takes.

    Raises:
        TimeoutError: it has not come.
        ConnectionRefusedError: the guest does not accept.
    """
    end = None if timeout is None else time.monotonic() + timeout
    line = b""
    while not line.endswith(b"\n"):
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        stream.settimeout(left)
        try:
            byte = stream.recv(1)
        except TimeoutError:
            continue
        except ConnectionError:
            byte = b""
        line += byte
        if not byte or len(line) > _GREETING_MAX:
            raise ConnectionRefusedError
    stream.settimeout(None)
