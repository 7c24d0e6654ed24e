"""Echo requests to a guest, and how long it has not answered them."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from typing import Self

from tests.system.vmd.netns import Namespace

INTERVAL_S = 0.02
_REQUEST, _REPLY = 8, 0
_HEADER = struct.Struct(">BBHHH")
_IP_HEADER = 20


class Echoes:
    """Asks from a namespace, by a thread; a context manager."""

    def __init__(self, space: Namespace, address: str) -> None:
        """Begin to ask a guest by its IPv4 address."""
        self._address = address
        self._ident = os.getpid() & 0xFFFF
        self._socket = space.within(
            lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        )
        self._lock = threading.Lock()
        self._last, self._longest = time.monotonic(), 0.0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="echoes")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ends.set()
        self._thread.join()
        self._socket.close()

    def longest_gap(self) -> float:
        """Return the longest time between two answers since the last call, in seconds.

        That may be the time from the last answer until now.
        """
        with self._lock:
            longest = max(self._longest, time.monotonic() - self._last)
            self._longest = 0.0
        return longest

    def _ask(self) -> None:
        number = 0
        while not self._ends.is_set():
            number = (number + 1) & 0xFFFF
            try:
                self._socket.sendto(_request(self._ident, number), (self._address, 0))
            except OSError:  # nobody has that address at the moment
                self._ends.wait(INTERVAL_S)
                continue
            deadline = time.monotonic() + INTERVAL_S
            while (left := deadline - time.monotonic()) > 0:
                if select.select([self._socket], [], [], left)[0]:
                    self._hear(self._socket.recv(2048))

    def _hear(self, packet: bytes) -> None:
        kind, _, _, ident, _ = _HEADER.unpack_from(packet, _IP_HEADER)
        if (kind, ident) == (_REPLY, self._ident):
            now = time.monotonic()
            with self._lock:
                self._longest = max(self._longest, now - self._last)
                self._last = now


def _request(ident: int, number: int) -> bytes:
    words = (_REQUEST << 8, 0, ident, number)
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return _HEADER.pack(_REQUEST, 0, total ^ 0xFFFF, ident, number)
