"""AgentX protocol data units: decoding those of a master agent, encoding those of a sub-agent.

Pure. Everything read is checked: any program may listen on the master's path.

Source: RFC 2741, sections 5 and 6.
"""

import enum
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Oid = tuple[int, ...]
"""An object identifier."""

PAYLOAD_MAX = 64 << 10
"""Bytes after the header of a unit that is read."""
RANGES_MAX = 1024
"""Search ranges in one request."""

_VERSION = 1
_HEADER_BYTES = struct.Struct("BBBB")
_INTERNET = (1, 3, 6, 1)
_SUBIDS_MAX = 128
_NON_DEFAULT_CONTEXT = 0x08
_NETWORK_BYTE_ORDER = 0x10
HEADER_SIZE = 20


class PduError(Exception):
    """The master sent something that is no AgentX unit; `str()` is one line."""


class PduType(enum.IntEnum):
    """Units that are sent or understood here."""

    OPEN = 1
    CLOSE = 2
    REGISTER = 3
    GET = 5
    GET_NEXT = 6
    GET_BULK = 7
    TEST_SET = 8
    COMMIT_SET = 9
    UNDO_SET = 10
    CLEANUP_SET = 11
    RESPONSE = 18


class Status(enum.IntEnum):
    """Errors in a response."""

    NONE = 0
    GENERAL = 5
    COMMIT_FAILED = 14
    UNDO_FAILED = 15
    NOT_WRITABLE = 17
    NOT_OPEN = 257
    UNSUPPORTED_CONTEXT = 262
    PARSE = 266


class CloseReason(enum.IntEnum):
    """Why a session is closed."""

    OTHER = 1
    PARSE_ERROR = 2
    SHUTDOWN = 5


class Tag(enum.IntEnum):
    """Types of values."""

    INTEGER = 2
    OCTET_STRING = 4
    OBJECT_IDENTIFIER = 6
    NO_SUCH_OBJECT = 128
    NO_SUCH_INSTANCE = 129
    END_OF_VIEW = 130


class Value(NamedTuple):
    """A value with its type; the last three types have no content."""

    tag: Tag
    content: int | bytes | Oid | None = None


class Binding(NamedTuple):
    """A variable and its value."""

    name: Oid
    value: Value


class Range(NamedTuple):
    """A search range: from `start`, perhaps included, to before `end`, or without an end."""

    start: Oid
    is_included: bool
    end: Oid


class Header(NamedTuple):
    """The header of each PDU."""

    type: int
    flags: int
    session: int
    transaction: int
    packet: int
    payload_size: int

    @property
    def order(self) -> str:
        """The byte order, as `struct` writes it."""
        return ">" if self.flags & _NETWORK_BYTE_ORDER else "<"


class Request(NamedTuple):
    """A GET, GET_NEXT or GET_BULK."""

    header: Header
    context: bytes
    ranges: tuple[Range, ...]
    non_repeaters: int = 0
    repetitions: int = 1


class Response(NamedTuple):
    """The master's answer to OPEN, REGISTER and the like."""

    header: Header
    status: int


def parse_header(data: bytes | bytearray | memoryview) -> Header:
    """Read the first `HEADER_SIZE` bytes of a unit.

    Raises:
        PduError: another version, or a payload that is too large or not of whole words.
    """
    version, kind, flags, _ = _HEADER_BYTES.unpack_from(data)
    if version != _VERSION:
        raise PduError(f"version {version} of the protocol, not {_VERSION}")
    order = ">" if flags & _NETWORK_BYTE_ORDER else "<"
    session, transaction, packet, size = struct.unpack_from(f"{order}4I", data, _HEADER_BYTES.size)
    if size > PAYLOAD_MAX or size % 4:
        raise PduError(f"a payload of {size} bytes")
    return Header(kind, flags, session, transaction, packet, size)


class _Reader:
    """Reads a payload from its start."""

    def __init__(self, header: Header, payload: bytes) -> None:
        self._order = header.order
        self._payload = payload
        self._at = 0

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._payload)

    def take(self, size: int) -> bytes:
        taken = self._payload[self._at : self._at + size]
        if len(taken) < size:
            raise PduError("a payload that ends too early")
        self._at += size
        return taken

    def unpack(self, layout: str) -> tuple[int, ...]:
        form = struct.Struct(self._order + layout)
        return form.unpack(self.take(form.size))

    def octets(self) -> bytes:
        (size,) = self.unpack("I")
        octets = self.take(size)
        self.take(-size % 4)
        return octets

    def oid(self) -> tuple[Oid, bool]:
        """Return an object identifier and whether its `include` is set."""
        count, prefix, include, _ = self.take(4)
        if count > _SUBIDS_MAX:
            raise PduError(f"an object identifier of {count} numbers")
        begin: Oid = (*_INTERNET, prefix) if prefix else ()
        return begin + self.unpack(f"{count}I"), bool(include)


def parse(header: Header, payload: bytes) -> Request | Response | None:
    """Read a unit, or None for one that has no content of interest here.

    Raises:
        PduError: the payload does not fit the header.
    """
    reader = _Reader(header, payload)
    if header.type == PduType.RESPONSE:
        _, status, _ = reader.unpack("IHH")
        return Response(header, status)
    if header.type not in {PduType.GET, PduType.GET_NEXT, PduType.GET_BULK}:
        return None
    context = reader.octets() if header.flags & _NON_DEFAULT_CONTEXT else b""
    non_repeaters, repetitions = 0, 1
    if header.type == PduType.GET_BULK:
        non_repeaters, repetitions = reader.unpack("HH")
    ranges: list[Range] = []
    while not reader.is_at_end:
        if len(ranges) == RANGES_MAX:
            raise PduError(f"more than {RANGES_MAX} search ranges")
        start, is_included = reader.oid()
        end, _ = reader.oid()
        ranges.append(Range(start, is_included, end))
    return Request(header, context, tuple(ranges), non_repeaters, repetitions)


# Writing: in network byte order, as each unit may choose.


def _unit(
    kind: PduType, payload: bytes, *, session: int, transaction: int, packet: int, flags: int = 0
) -> bytes:
    start = _HEADER_BYTES.pack(_VERSION, kind, flags | _NETWORK_BYTE_ORDER, 0)
    return start + struct.pack(">4I", session, transaction, packet, len(payload)) + payload


def _octets(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)


def _oid(oid: Oid) -> bytes:
    prefix = 0
    if oid[:4] == _INTERNET and len(oid) > 4 and 0 < oid[4] < 256:
        prefix, oid = oid[4], oid[5:]
    return struct.pack(f">BBBB{len(oid)}I", len(oid), prefix, 0, 0, *oid)


def _value(value: Value) -> bytes:
    match value.content:
        case int(number):
            return struct.pack(">i", number)
        case bytes(octets):
            return _octets(octets)
        case tuple(oid):
            return _oid(oid)
        case None:
            return b""


def open_unit(packet: int, description: bytes, timeout_s: int) -> bytes:
    """Return an OPEN; the master waits `timeout_s`, 0 to 255, for each answer."""
    payload = struct.pack(">B3x", timeout_s) + _oid(()) + _octets(description)
    return _unit(PduType.OPEN, payload, session=0, transaction=0, packet=packet)


def register_unit(session: int, packet: int, context: bytes, subtree: Oid) -> bytes:
    """Return a REGISTER of all below `subtree`, in a context unless it is empty."""
    payload, flags = _in_context(context)
    priority = 127
    payload += struct.pack(">BBBB", 0, priority, 0, 0) + _oid(subtree)
    return _unit(
        PduType.REGISTER, payload, session=session, transaction=0, packet=packet, flags=flags
    )


def _in_context(context: bytes) -> tuple[bytes, int]:
    return (_octets(context), _NON_DEFAULT_CONTEXT) if context else (b"", 0)


def close_unit(session: int, packet: int, reason: CloseReason) -> bytes:
    """Return a CLOSE."""
    payload = struct.pack(">B3x", reason)
    return _unit(PduType.CLOSE, payload, session=session, transaction=0, packet=packet)


def response_unit(
    request: Header, bindings: Iterable[Binding], status: Status = Status.NONE, index: int = 0
) -> bytes:
    """Return the response to a request; `index` is of the variable that is at fault, from 1."""
    payload = struct.pack(">IHH", 0, status, index) + b"".join(
        struct.pack(">HH", binding.value.tag, 0) + _oid(binding.name) + _value(binding.value)
        for binding in bindings
    )
    return _unit(
        PduType.RESPONSE,
        payload,
        session=request.session,
        transaction=request.transaction,
        packet=request.packet,
    )


def dotted(oid: Sequence[int]) -> str:
    """Write an object identifier as people do."""
    return ".".join(map(str, oid))
