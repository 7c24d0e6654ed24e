"""Long indirect descriptor tables, checked and translated as a whole.

A driver's request for much data has a table of many descriptors: a header, one for each piece of
the data, a status. To look at each is most of what such a request costs an interpreter. But a table
is one large number too, with a descriptor in each 128 bits of it, and arithmetic on it does the
same to all descriptors at once: check what kind they are and how they are linked, that each lies in
guest memory, and make of them what preadv(2) takes. No sum here is carried from one into the next.

Source: virtio 1.2 §2.7.5
"""

import ctypes
import struct
from typing import NamedTuple

from vmm_kvm.scatter import Scatter
from vmm_kvm.virtio.abi import VRING_DESC_F_NEXT, VRING_DESC_F_WRITE

LONG_MIN = 8
"""Descriptors from which on a table is quicker as a whole; found by measuring."""
LONG_MAX = 256
"""Descriptors up to which it is taken as a whole: more than a disk offers its driver (SEG_MAX), and
few enough that what a guest can have remembered is at most 3 MiB a queue."""

_SIZE = 16  # bytes of a descriptor: address (64 bits), length (32), flags (16), next (16)
_LANE = 8 * _SIZE
_DESCRIPTOR = struct.Struct("<QIHH")
_PLACE = struct.Struct("<QI")  # address and length of a descriptor
_PIECES_MAX = LONG_MAX - 2
_EACH = sum(1 << _LANE * number for number in range(_PIECES_MAX))
_LENGTH, _FLAGS, _NEXT = 64, 96, 112  # where they begin, in bits
_ADDRESSES = _EACH * ((1 << 64) - 1)
_LENGTHS = _EACH * ((1 << 32) - 1)
# A bit above all addresses, and all sums of an address and a length.
_BEYOND = 66
_SUM_OF_LANES = (1 << _LANE) - 1  # a number modulo this is the sum of its digits
_KINDS_MAX = 64  # of tables, about which something is remembered
_RECENT_MAX = 64  # tables that are remembered themselves


def _links(flags: int) -> int:
    """Return flags and next of pieces, of which the first is the table's second descriptor."""
    return sum(
        (number + 2 << _NEXT | flags << _FLAGS) << _LANE * number for number in range(_PIECES_MAX)
    )


_READABLE = _links(VRING_DESC_F_NEXT)
_WRITABLE = _links(VRING_DESC_F_NEXT | VRING_DESC_F_WRITE)


class _Kind(NamedTuple):
    """Numbers for tables with so many pieces, of which the first is so long, and of one kind."""

    each: int
    """1 for each piece."""
    links: int
    """What flags and next have to be."""
    usual: int
    """The same, and the lengths, if they are all alike."""
    inside: int
    """A bit that is set if an address or an end was compared and is inside of the span."""
    room: int
    """What addresses are subtracted from, to compare them, if lengths are alike."""
    below_start: int
    """What an address is added to, to compare it."""
    distance: int
    """From an address of the guest to ours."""
    usual_distance: int
    """The same, and the lengths where iovecs have them."""


class Span:
    """A piece of guest memory without holes, in which tables and all that they name may lie."""

    __slots__ = ("_end", "_host", "_kinds", "_memory", "_recent", "_start")

    def __init__(self, memory: memoryview, start: int) -> None:
        """Look at `memory`, which is at guest-physical address `start`; not empty, writable."""
        self._memory = memory
        self._start = start
        self._end = start + len(memory)
        self._host = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._kinds: dict[tuple[int, int, int], _Kind] = {}
        self._recent: dict[int, tuple[bytes, Scatter]] = {}

    def divide(self, table: bytes) -> tuple[memoryview, Scatter, memoryview] | None:
        """Return header, pieces and status of an indirect table of 3 to 256 descriptors.

        The header is readable, the status writable. None for a table that is otherwise, has
        anything empty, or anything elsewhere.
        """
        start, end = self._start, self._end
        header, header_size, flags, following = _DESCRIPTOR.unpack_from(table)
        if flags != VRING_DESC_F_NEXT or following != 1:
            return None
        status, status_size, flags, _ = _DESCRIPTOR.unpack_from(table, len(table) - _SIZE)
        if flags != VRING_DESC_F_WRITE:
            return None
        if not (
            start <= header < header + header_size <= end
            and start <= status < status + status_size <= end
        ):
            return None
        # Who reads or writes by the same buffers again sends the same again.
        middle = table[_SIZE:-_SIZE]
        address, length = _PLACE.unpack_from(middle)
        recent = self._recent.get(address)
        if recent and recent[0] == middle:
            pieces = recent[1]
        elif made := self._pieces(middle, length):
            pieces = made
            if len(self._recent) == _RECENT_MAX:
                self._recent.clear()
            self._recent[address] = middle, pieces
        else:
            return None
        memory, header, status = self._memory, header - start, status - start
        return (
            memory[header : header + header_size],
            pieces,
            memory[status : status + status_size],
        )

    def _pieces(self, table: bytes, length: int) -> Scatter | None:
        """Return what is between header and status; `length` is that of the first piece."""
        count = len(table) // _SIZE
        is_writable = table[_FLAGS // 8] & VRING_DESC_F_WRITE
        kind = self._kinds.get((count, length, is_writable)) or self._know(
            count, length, is_writable
        )
        number = int.from_bytes(table, "little")
        addresses = number & _ADDRESSES
        number ^= addresses
        if number == kind.usual:  # as every driver has it
            size = length * count
            room, distance = kind.room - addresses, kind.usual_distance
            has_empty = not length
        else:
            number ^= kind.links
            lengths = number >> _LENGTH
            if lengths & _LENGTHS != lengths:
                return None
            size = lengths % _SUM_OF_LANES
            room = kind.each * ((1 << _BEYOND) + self._end) - addresses - lengths
            distance = kind.distance + number
            has_empty = bool((kind.inside - lengths) & kind.inside)
        inside = kind.inside
        if (
            has_empty
            or room & inside != inside
            or (self._start and (addresses + kind.below_start) & inside != inside)
        ):
            return None
        iovecs = (addresses + distance).to_bytes(_SIZE * count, "little")
        return Scatter(self._memory, self._host, iovecs, size, is_writable=bool(is_writable))

    def _know(self, count: int, length: int, is_writable: int) -> _Kind:
        """Return what is known of a kind of tables; it is kept for the next."""
        lanes = (1 << _LANE * count) - 1
        each = _EACH & lanes
        links = (_WRITABLE if is_writable else _READABLE) & lanes
        distance = each * (self._host - self._start)
        lengths = each * length << _LENGTH
        kind = _Kind(
            each=each,
            links=links,
            usual=links | lengths,
            inside=each << _BEYOND,
            room=each * ((1 << _BEYOND) + self._end - length),
            below_start=each * ((1 << _BEYOND) - self._start),
            distance=distance,
            usual_distance=distance + lengths,
        )
        if len(self._kinds) == _KINDS_MAX:
            self._kinds.clear()
        self._kinds[count, length, is_writable] = kind
        return kind
