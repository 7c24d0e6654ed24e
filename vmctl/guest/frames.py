"""The protocol between a client and a guest's agent: frames, and credit for those with data.

The other side is a guest, which may send anything: a frame is bounded before it is kept, and data
never exceed their credit. docs/agent.md describes the protocol; the agent has its own code for it,
`vmm_agent/agent.py`, and tests compare both.
"""

import enum
import json
import struct
from typing import Any

PROTOCOL = 1
PORT = 1024
FRAME_MAX = 256 << 10
"""Bytes of a frame behind its header, at most."""
PIECE = 32 << 10
"""Bytes of a frame with data, as they are sent."""
WINDOW = 256 << 10
"""Bytes of a channel in flight: sent, and not acknowledged yet."""

HEADER = struct.Struct("!BI")
TAKEN_BODY = struct.Struct("!BI")
SIZE_BODY = struct.Struct("!HH")


class Kind(enum.IntEnum):
    """The kind of a frame."""

    # From the agent.
    HELLO = 1
    STARTED = 2
    DONE = 3
    FAILED = 4
    EXIT = 5
    # From the client.
    REQUEST = 16
    WINDOW_SIZE = 17
    SIGNAL = 18
    # Data: INPUT from the client, the two others from the agent.
    INPUT = 32
    OUTPUT = 33
    ERRORS = 34
    # From the receiver of data.
    TAKEN = 35


class ProtocolError(Exception):
    """The other side violates the protocol; `str()` says how."""


def frame(kind: Kind, payload: bytes = b"") -> bytes:
    """Return a frame as it is sent."""
    assert len(payload) <= FRAME_MAX
    return HEADER.pack(kind, len(payload)) + payload


class FrameReader:
    """Finds frames in received data; keeps one incomplete frame, and no more."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        """Take received bytes."""
        self._data += data

    def next(self) -> tuple[Kind, bytes] | None:
        """Return the agent's next complete frame; None if there is none yet.

        Raises:
            ProtocolError: it is too large, or of no kind that an agent sends.
        """
        if len(self._data) < HEADER.size:
            return None
        number, size = HEADER.unpack_from(self._data)
        if number not in _FROM_AGENT:
            raise ProtocolError(f"unknown frame {number}")
        if size > FRAME_MAX:
            raise ProtocolError(f"frame of {size} bytes")
        end = HEADER.size + size
        if len(self._data) < end:
            return None
        payload = bytes(self._data[HEADER.size : end])
        del self._data[:end]
        return Kind(number), payload


_FROM_AGENT = frozenset(
    (
        *(Kind.HELLO, Kind.STARTED, Kind.DONE, Kind.FAILED, Kind.EXIT),
        *(Kind.OUTPUT, Kind.ERRORS, Kind.TAKEN),
    )
)


def fields_of(payload: bytes) -> dict[str, Any]:  # type: ignore[explicit-any] # what JSON holds
    """Return the object in a frame.

    Raises:
        ProtocolError: there is none.
    """
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ProtocolError("invalid JSON")
    return fields


def number_of(fields: dict[str, Any], name: str, most: int) -> int:  # type: ignore[explicit-any] # what JSON holds
    """Return a number of an object, 0 to `most`.

    Raises:
        ProtocolError: it is no such number.
    """
    value = fields.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise ProtocolError(f"invalid {name}")
    return value


def text_of(fields: dict[str, Any], name: str) -> str:  # type: ignore[explicit-any] # what JSON holds
    """Return a text of an object.

    Raises:
        ProtocolError: it is none.
    """
    value = fields.get(name)
    if not isinstance(value, str):
        raise ProtocolError(f"invalid {name}")
    return value
