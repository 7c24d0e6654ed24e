"""Frames on a stream socket, each after its length, as passt(1) takes them.

There are no headers and no offloads: a frame is what would be on a wire. A socket that takes no
more loses frames, as a wire would, but never a part of one.

Source: passt(1), "qemu's socket networking"; QEMU's `-netdev stream`
"""

import os
import struct
from collections.abc import Sequence

from vmm_kvm.net.ethernet import Filter
from vmm_kvm.net.paths import Traffic

FRAME_MAX = 65535 + 18
"""Bytes of a frame, without its length."""

_LENGTH = struct.Struct(">I")
_HEADER = bytes(12)
_READ = 1 << 17


class Stream:
    """One connection; its descriptor stays the caller's. One thread."""

    has_filter = False
    """The receiver has to drop unwanted frames."""
    offloads = 0

    def __init__(self, fd: int, name: str, traffic: Traffic) -> None:
        """Speak on `fd`, a stream socket; `name` is for messages, `traffic` counts frames."""
        self.fds: tuple[int, ...] = (fd,)
        self.name = name
        self._traffic = traffic
        self._input = bytearray()
        self._output = b""
        os.set_blocking(fd, False)

    def close(self) -> None:
        """Forget a half-read frame."""
        self._input.clear()

    def set_offloads(self, _offloads: int) -> None:
        """Do nothing: there are none."""

    def set_queues(self, _count: int) -> None:
        """Do nothing: there is one."""

    def set_filter(self, _wanted: Filter | None) -> None:
        """Do nothing."""

    def receive(self, _queue: int, buffers: Sequence[memoryview]) -> int:
        """Take the next frame, with a header of zeroes; returns its bytes, 0 if there is none."""
        self._flush()
        frame = self._next()
        if frame is None:
            return 0
        self._traffic.received += len(frame)
        data = memoryview(_HEADER + frame)
        at = 0
        for buffer in buffers:
            piece = data[at : at + len(buffer)]
            buffer[: len(piece)] = piece
            at += len(piece)
        return at

    def send(self, _queue: int, buffers: Sequence[memoryview | bytes]) -> bool:
        """Send a frame, without its header; returns False where it is lost."""
        self._flush()
        frame = b"".join(buffers)[len(_HEADER) :]
        if self._output or not 0 < len(frame) <= FRAME_MAX:
            return False
        data = _LENGTH.pack(len(frame)) + frame
        sent = self._write(data)
        if sent:
            self._output = data[sent:]
            self._traffic.sent += len(frame)
        return bool(sent)

    def _next(self) -> bytes | None:
        """Return the next frame that is there in full."""
        while True:
            found = self._input
            if len(found) >= _LENGTH.size:
                (size,) = _LENGTH.unpack_from(found)
                end = _LENGTH.size + size
                if size > FRAME_MAX:  # no frame: nothing after it can be understood
                    found.clear()
                    return None
                if len(found) >= end:
                    frame = bytes(found[_LENGTH.size : end])
                    del found[:end]
                    return frame
            try:
                data = os.read(self.fds[0], _READ)
            except OSError:  # none, or the other end is gone
                return None
            if not data:
                return None
            found += data

    def _flush(self) -> None:
        if self._output:
            self._output = self._output[self._write(self._output) :]

    def _write(self, data: bytes) -> int:
        try:
            return os.write(self.fds[0], data)
        except OSError:  # it is full, or the other end is gone
            return 0
