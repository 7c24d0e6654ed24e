"""A master agent of AgentX, as far as tests of the sub-agent need one."""

from __future__ import annotations

import struct
from typing import NamedTuple

Oid = tuple[int, ...]

VERSION_AND_ORDER = (1, 0x10)
CONTEXT = 0x08
OPEN, CLOSE, REGISTER, GET, GET_NEXT, GET_BULK, TEST_SET, RESPONSE = 1, 2, 3, 5, 6, 7, 8, 18
INTEGER, OCTETS, OID_TYPE, NO_OBJECT, NO_INSTANCE, END = 2, 4, 6, 128, 129, 130


class Unit(NamedTuple):
    """A PDU from the sub-agent."""

    type: int
    flags: int
    session: int
    transaction: int
    packet: int
    payload: bytes


def octets(data: bytes) -> bytes:
    """Return a string in its encoding."""
    return struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)


def oid(numbers: Oid, *, is_included: bool = False) -> bytes:
    """Return an object identifier in its encoding, without a prefix."""
    return struct.pack(f">BBBB{len(numbers)}I", len(numbers), 0, is_included, 0, *numbers)


def unit(kind: int, payload: bytes, *, session: int, packet: int = 1, flags: int = 0) -> bytes:
    """Return a PDU of the master's in network byte order."""
    version, order = VERSION_AND_ORDER
    start = struct.pack(">BBBB", version, kind, flags | order, 0)
    return start + struct.pack(">4I", session, 7, packet, len(payload)) + payload


def parse_units(data: bytes) -> tuple[list[Unit], bytes]:
    """Return the whole PDUs at the start of `data`, and the rest."""
    units = []
    while len(data) >= 20:
        _, kind, flags, _, session, transaction, packet, size = struct.unpack_from(">BBBB4I", data)
        if len(data) < 20 + size:
            break
        units.append(Unit(kind, flags, session, transaction, packet, data[20 : 20 + size]))
        data = data[20 + size :]
    return units, data


def read_oid(data: bytes) -> tuple[Oid, bytes]:
    """Return the object identifier at the start of `data`, and the bytes after it."""
    count, prefix, _, _ = data[:4]
    numbers = struct.unpack_from(f">{count}I", data, 4)
    return ((1, 3, 6, 1, prefix) if prefix else ()) + numbers, data[4 + 4 * count :]


def read_response(payload: bytes) -> tuple[int, list[tuple[Oid, int, int | bytes | Oid | None]]]:
    """Return a response's error and its variables: name, type, value."""
    _, error, _ = struct.unpack_from(">IHH", payload)
    data, found = payload[8:], []
    while data:
        (kind,) = struct.unpack_from(">H", data)
        name, data = read_oid(data[4:])
        value: int | bytes | Oid | None = None
        if kind == INTEGER:
            (value,) = struct.unpack_from(">i", data)
            data = data[4:]
        elif kind == OCTETS:
            (size,) = struct.unpack_from(">I", data)
            value, data = data[4 : 4 + size], data[4 + size + -size % 4 :]
        elif kind == OID_TYPE:
            value, data = read_oid(data)
        found.append((name, kind, value))
    return error, found
