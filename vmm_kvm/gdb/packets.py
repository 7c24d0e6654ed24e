"""Packets of GDB's remote protocol: from bytes that came to packets, and back.

Pure: no descriptors. What comes is bounded and may be anything.

Source: "Debugging with GDB", appendix E.1 (overview of packets) and E.2 (binary data).
"""

from typing import NamedTuple

PACKET_MAX = 0x4000
"""Bytes of a packet between `$` and `#`, in either direction."""

_ESCAPE = 0x7D
_ESCAPED = frozenset(b"$#}*")
_INTERRUPT = 0x03


class Packet(NamedTuple):
    """A command of the debugger."""

    text: bytes
    """Without escapes."""


class Interrupt(NamedTuple):
    """The debugger asks a running machine to stop."""


class Damaged(NamedTuple):
    """A packet whose checksum is wrong: it is to be sent again."""


class Again(NamedTuple):
    """Our last packet did not arrive whole: it is to be sent again."""


class OverflowedError(Exception):
    """More data came than any packet may have."""


Received = Packet | Interrupt | Damaged | Again


class Reader:
    """Collects bytes and yields packets; at most one packet is kept."""

    def __init__(self) -> None:
        """Begin between two packets."""
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        """Take bytes as they came.

        Raises:
            OverflowedError: a packet that has no end, or several unread ones.
        """
        self._bytes += data
        if len(self._bytes) > 4 * PACKET_MAX:
            raise OverflowedError

    def next(self) -> Received | None:
        """Return the next thing that has come whole, None if there is none."""
        while self._bytes:
            first = self._bytes[0]
            if first == ord("$"):
                return self._packet()
            del self._bytes[0]
            if first == _INTERRUPT:
                return Interrupt()
            if first == ord("-"):
                return Again()
            # An acknowledgement, or noise on the line.
        return None

    def _packet(self) -> Received | None:
        end = self._bytes.find(b"#")
        if end < 0 and len(self._bytes) > PACKET_MAX:
            raise OverflowedError
        if end < 0 or len(self._bytes) < end + 3:
            return None
        content, checksum = bytes(self._bytes[1:end]), bytes(self._bytes[end + 1 : end + 3])
        del self._bytes[: end + 3]
        if checksum.lower() != b"%02x" % (sum(content) & 0xFF):
            return Damaged()
        return Packet(_unescape(content))


def framed(text: bytes) -> bytes:
    """Return a packet as it is sent: escaped, with its checksum."""
    content = bytearray()
    for byte in text:
        if byte in _ESCAPED:
            content += bytes((_ESCAPE, byte ^ 0x20))
        else:
            content.append(byte)
    return b"$%b#%02x" % (bytes(content), sum(content) & 0xFF)


def _unescape(content: bytes) -> bytes:
    parts = content.split(b"}")
    rest = (bytes((part[0] ^ 0x20,)) + part[1:] for part in parts[1:] if part)
    return parts[0] + b"".join(rest)
