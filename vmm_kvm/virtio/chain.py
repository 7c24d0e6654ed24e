"""Descriptor chains: the buffers of a request, decoded in three ways with the same result.

The driver's descriptors are copied once, then checked, then used. A chain is a list of views of
guest memory, so the data themselves are never copied here.

`Decoder.take` follows one descriptor after the other. Most requests have an indirect table whose
links lead from each entry to the next: their links need not be followed, which saves a third of the
time. And a driver's request for much data has a table of many descriptors: a header, one for each
piece of the data, a status. Reading each one is most of such a request's cost in an interpreter.
But a table is one large number too, with a descriptor in each 128 bits of it, and arithmetic on it
does the same to all descriptors at once: check what kind they are and how they are linked, that
each lies in guest memory, and make of them what preadv(2) takes. No sum carries from one descriptor
into the next. The quicker ways return None for a chain that they do not take; only following it
says what is wrong.

Source: virtio 1.2 §2.7.5
"""

import ctypes
import struct
from typing import NamedTuple, Protocol

from vmm_kvm.errors import GuestMemoryError, VirtqueueError
from vmm_kvm.scatter import Scatter
from vmm_kvm.virtio.abi import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from vmm_kvm.write_log import WriteLog

INDIRECT_MAX = 1024
"""Descriptors in an indirect table that we take: as many as preadv(2) takes buffers."""
LONG_MIN = 8
"""Measured: tables of at least so many descriptors are quicker as a whole."""
LONG_MAX = 256
"""Descriptors up to which it is taken as a whole: more than a disk offers its driver (SEG_MAX), and
few enough that remembered tables take at most 3 MiB a queue."""

DESCRIPTOR_SIZE = 16
"""Bytes of a descriptor: address (64 bits), length (32), flags (16), next (16)."""

_DESCRIPTOR = struct.Struct("<QIHH")
_unpack_descriptor, _unpack_table = _DESCRIPTOR.unpack_from, _DESCRIPTOR.iter_unpack
_LONG, _TOO_LONG = LONG_MIN * DESCRIPTOR_SIZE, LONG_MAX * DESCRIPTOR_SIZE + 1
_KNOWN_IN_TABLE = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE
_ADDRESS_BITS = 47  # no more is mapped below 128 TiB
_HIGH_START = 1 << 32
_LANE = 8 * DESCRIPTOR_SIZE
_PLACE = struct.Struct("<QI")  # address and length of a descriptor
_PIECES_MAX = LONG_MAX - 2
_EACH = int.from_bytes((1).to_bytes(DESCRIPTOR_SIZE, "little") * _PIECES_MAX, "little")
_LENGTH, _FLAGS, _NEXT = 64, 96, 112  # where they begin, in bits
_ADDRESSES = _EACH * ((1 << 64) - 1)
_LENGTHS = _EACH * ((1 << 32) - 1)
# A bit above all addresses, and all sums of an address and a length.
_BEYOND = 66
_SUM_OF_LANES = (1 << _LANE) - 1  # a number modulo this is the sum of its digits
_KINDS_MAX = 64  # kinds of tables with remembered numbers
_RECENT_MAX = 64  # tables that are remembered themselves


def _links(flags: int) -> int:
    """Return flags and next of all pieces; the first piece is the table's second descriptor."""
    pieces = (_DESCRIPTOR.pack(0, 0, flags, number + 2) for number in range(_PIECES_MAX))
    return int.from_bytes(b"".join(pieces), "little")


_READABLE = _links(VRING_DESC_F_NEXT)
_WRITABLE = _links(VRING_DESC_F_NEXT | VRING_DESC_F_WRITE)


class Memory(Protocol):
    """Guest-physical memory, as far as a queue needs it."""

    @property
    def writes(self) -> WriteLog:
        """The log in which writes are marked."""

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a writable view of `size` bytes at `gpa`; raises GuestMemoryError."""


class Chain:
    """One descriptor chain: the buffers of one request.

    The guest can change their contents at any time: copy first, then check, then use.
    """

    __slots__ = ("head", "pieces", "readable", "writable")

    def __init__(
        self,
        head: int,
        readable: list[memoryview],
        writable: list[memoryview],
        pieces: Scatter | None = None,
    ) -> None:
        self.head = head
        """Number of its first descriptor, which names the chain."""
        self.readable = readable
        """The driver's data for the device, in order; none is empty."""
        self.writable = writable
        """Buffers for the device's writes, in order; none is empty."""
        self.pieces = pieces
        """What lies between the readable buffer and the writable one, which are then the only
        ones; None unless a caller has asked for it."""

    def spread(self) -> None:
        """Move `pieces` to the readable buffers or the writable ones."""
        pieces, self.pieces = self.pieces, None
        if pieces and pieces.is_writable:
            self.writable[:0] = pieces
        elif pieces:
            self.readable += pieces


class _Kind(NamedTuple):
    """Numbers for tables with so many pieces, of which the first is so long, and of one kind."""

    each: int
    """1 for each piece."""
    links: int
    """The required values of flags and next."""
    usual: int
    """The same, and the lengths, if they are all alike."""
    inside: int
    """A bit that is set if an address or an end was compared and is inside of the span."""
    room: int
    """The number that addresses are subtracted from, to compare them, if lengths are alike."""
    below_start: int
    """The number that is added to an address, to compare it."""
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

    def divide(self, head: int, table: bytes) -> Chain | None:
        """Return the chain of an indirect table of 3 to 256 descriptors, `head`, with its pieces.

        The header is readable, the status writable. None for any other table, one with an empty
        buffer, or one outside of the span.
        """
        start, end = self._start, self._end
        header, header_size, flags, following = _unpack_descriptor(table)
        if flags != VRING_DESC_F_NEXT or following != 1:
            return None
        status, status_size, flags, _ = _unpack_descriptor(table, len(table) - DESCRIPTOR_SIZE)
        if flags != VRING_DESC_F_WRITE:
            return None
        if not (
            start <= header < header + header_size <= end
            and start <= status < status + status_size <= end
        ):
            return None
        # A driver that uses the same buffers again sends the same table again.
        middle = table[DESCRIPTOR_SIZE:-DESCRIPTOR_SIZE]
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
        return Chain(
            head,
            [memory[header : header + header_size]],
            [memory[status : status + status_size]],
            pieces,
        )

    def _pieces(self, table: bytes, length: int) -> Scatter | None:
        """Return the pieces between header and status; `length` is that of the first."""
        count = len(table) // DESCRIPTOR_SIZE
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
        iovecs = (addresses + distance).to_bytes(DESCRIPTOR_SIZE * count, "little")
        return Scatter(self._memory, self._host, iovecs, size, is_writable=bool(is_writable))

    def _know(self, count: int, length: int, is_writable: int) -> _Kind:
        """Return the numbers for a kind of tables; they are kept for the next table."""
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


class Decoder:
    """Decodes the chains of one queue."""

    __slots__ = (
        "_descriptors",
        "_has_indirect",
        "_low",
        "_low_end",
        "_memory",
        "_size",
        "_spans",
        "_view",
    )

    def __init__(self, memory: Memory, descriptors: int, size: int, *, has_indirect: bool) -> None:
        """Look at the table of `size` descriptors at guest-physical address `descriptors`.

        `has_indirect` is whether indirect tables were negotiated.

        Raises:
            GuestMemoryError: the table is not inside one region of RAM.
        """
        self._size = size
        self._memory = memory
        self._view = memory.view
        # Nearly every buffer is there: slicing it takes half the time of a call.
        self._low = _longest_view(memory, 0)
        self._low_end = len(self._low)
        self._descriptors = memory.view(descriptors, DESCRIPTOR_SIZE * size)
        self._has_indirect = has_indirect
        self._spans: list[Span] | None = None  # not looked for yet

    def take(self, head: int, with_pieces: bool) -> Chain:
        """Return the chain that begins with descriptor `head`.

        With `with_pieces`, the data of a long one may come as `Chain.pieces`.

        Raises:
            VirtqueueError: the chain is malformed.
            GuestMemoryError: a buffer is not inside one region of RAM.

        Source: virtio 1.2 §2.7.5
        """
        limit = left = self._size
        if head >= limit:
            raise VirtqueueError(f"descriptor {head} of {limit}")
        table: memoryview | bytes = self._descriptors
        address, length, flags, following = _unpack_descriptor(table, head << 4)
        is_indirect = False
        if flags & VRING_DESC_F_INDIRECT:
            table = self._indirect_table(address, length, flags)
            if with_pieces and _LONG <= length < _TOO_LONG:
                spans = self._find_spans() if self._spans is None else self._spans
                for span in spans:
                    if chain := span.divide(head, table):
                        return chain
            if chain := self._in_order(head, table):
                return chain
            limit = left = length // DESCRIPTOR_SIZE
            is_indirect = True
            address, length, flags, following = self._first(head, table)
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        low, low_end, view = self._low, self._low_end, self._view
        while True:
            if not length:
                raise VirtqueueError(f"descriptor {head}: an empty buffer")
            end = address + length
            buffer = low[address:end] if end <= low_end else view(address, length)
            if flags & VRING_DESC_F_WRITE:
                writable.append(buffer)
            elif writable:
                raise VirtqueueError(f"descriptor {head}: a readable buffer after a writable one")
            else:
                readable.append(buffer)
            if not flags & VRING_DESC_F_NEXT:
                return Chain(head, readable, writable)
            left -= 1
            if not left:
                raise VirtqueueError(f"descriptor {head}: a chain of more than {limit}")
            if following >= limit:
                raise VirtqueueError(f"descriptor {head}: leads to {following} of {limit}")
            address, length, flags, following = _unpack_descriptor(table, following << 4)
            if flags & VRING_DESC_F_INDIRECT:
                if is_indirect:
                    raise VirtqueueError(f"descriptor {head}: an indirect table in another")
                table = self._indirect_table(address, length, flags)
                limit = left = length // DESCRIPTOR_SIZE
                is_indirect = True
                address, length, flags, following = self._first(head, table)

    def _first(self, head: int, table: bytes) -> tuple[int, int, int, int]:
        found: tuple[int, int, int, int] = _unpack_descriptor(table)
        if found[2] & VRING_DESC_F_INDIRECT:
            raise VirtqueueError(f"descriptor {head}: an indirect table in another")
        return found

    def _in_order(self, head: int, table: bytes) -> Chain | None:
        """Return the chain of an indirect table whose links lead from each entry to the next."""
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        low, low_end = self._low, self._low_end
        for number, (address, length, flags, following) in enumerate(_unpack_table(table), 1):
            end = address + length
            if not length or end > low_end or flags > _KNOWN_IN_TABLE:
                return None
            if flags & VRING_DESC_F_WRITE:
                writable.append(low[address:end])
            elif writable:
                return None
            else:
                readable.append(low[address:end])
            if not flags & VRING_DESC_F_NEXT:
                return Chain(head, readable, writable)
            if following != number:
                return None
        return None

    def _find_spans(self) -> list[Span]:
        high = _longest_view(self._memory, _HIGH_START)
        self._spans = [
            Span(memory, start) for start, memory in ((0, self._low), (_HIGH_START, high)) if memory
        ]
        return self._spans

    def _indirect_table(self, address: int, length: int, flags: int) -> bytes:
        if not self._has_indirect:
            raise VirtqueueError("an indirect descriptor, which was not negotiated")
        if flags & VRING_DESC_F_NEXT:
            raise VirtqueueError("an indirect descriptor that has a next one")
        if length % DESCRIPTOR_SIZE or not 0 < length <= INDIRECT_MAX * DESCRIPTOR_SIZE:
            raise VirtqueueError(f"an indirect table of {length} bytes")
        end = address + length
        return bytes(
            self._low[address:end] if end <= self._low_end else self._view(address, length)
        )


def _longest_view(memory: Memory, start: int) -> memoryview:
    """Return the longest view of `memory` from an address: RAM lies from 0, and from 4 GiB."""
    size = 0
    for bit in reversed(range(_ADDRESS_BITS)):
        try:
            memory.view(start, size | 1 << bit)
        except GuestMemoryError:
            continue
        size |= 1 << bit
    return memory.view(start, size) if size else memoryview(b"")
