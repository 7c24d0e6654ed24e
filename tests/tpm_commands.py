"""Commands of a TPM 2.0, as bytes, and the needed parts of its responses.

Source: TCG TPM 2.0 Library, part 3
"""

from __future__ import annotations

import struct

_OWNER = 0x4000_0001
_INDEX = 0x0150_0001
# A password session with an empty password.
_SESSION = struct.pack(">IIHBH", 9, 0x4000_0009, 0, 0, 0)
# An index that its owner may read and write, and that is not protected against guessing.
_ATTRIBUTES = 1 << 1 | 1 << 17 | 1 << 25
_SHA256 = 0x000B


def _command(tag: int, code: int, body: bytes) -> bytes:
    return struct.pack(">HII", tag, 10 + len(body), code) + body


STARTUP = _command(0x8001, 0x144, b"\0\0")
SELF_TEST = _command(0x8001, 0x143, b"\1")
"""Takes some time."""


def get_random(size: int) -> bytes:
    """Ask for random bytes, at most 32."""
    return _command(0x8001, 0x17B, struct.pack(">H", size))


def define(size: int) -> bytes:
    """Make room for a secret that stays."""
    public = struct.pack(">IHIHH", _INDEX, _SHA256, _ATTRIBUTES, 0, size)
    body = struct.pack(">I", _OWNER) + _SESSION + b"\0\0" + struct.pack(">H", len(public)) + public
    return _command(0x8002, 0x12A, body)


def write(secret: bytes) -> bytes:
    """Keep a secret."""
    head = struct.pack(">II", _OWNER, _INDEX) + _SESSION
    return _command(0x8002, 0x137, head + struct.pack(">H", len(secret)) + secret + b"\0\0")


def read(size: int) -> bytes:
    """Ask for a secret."""
    head = struct.pack(">II", _OWNER, _INDEX) + _SESSION
    return _command(0x8002, 0x14E, head + struct.pack(">HH", size, 0))


def code(response: bytes) -> int:
    """Return a response's code; 0 is success."""
    found: int = struct.unpack_from(">HII", response)[2]
    return found


def data(response: bytes) -> bytes:
    """Return the data of a successful response to `get_random` or `read`."""
    at = 10 if response[:2] == b"\x80\x01" else 14
    size = int.from_bytes(response[at : at + 2], "big")
    return response[at + 2 : at + 2 + size]
