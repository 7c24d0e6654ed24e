"""AML: the byte code of ACPI's namespace, as far as this machine's DSDT needs it.

Each function returns the encoding of one term; terms are put together by passing them to another.

Source: ACPI 6.5 chapter 20 (AML), §6.4 (resource descriptors).
"""

import struct

_NAME_SIZE = 4
_DUAL_NAME_PREFIX = b"\x2e"
_MULTI_NAME_PREFIX = b"\x2f"

ARG0 = b"\x68"
ARG3 = b"\x6b"
ZERO = b"\x00"
END_TAG = b"\x79\x00"


def _package_length(body: bytes) -> bytes:
    """Return `body` behind its PkgLength, which counts itself too."""
    for extra in range(4):
        size = len(body) + 1 + extra
        if extra == 0 and size < 1 << 6:
            return bytes((size,)) + body
        if extra and size < 1 << (4 + 8 * extra):
            lead = extra << 6 | size & 0xF
            return bytes((lead,)) + (size >> 4).to_bytes(extra, "little") + body
    raise ValueError(f"AML package of {len(body)} bytes")


def name_string(path: str) -> bytes:
    r"""Return a name: parts of up to four characters divided by dots, `\` in front for the root."""
    root = b"\\" if path.startswith("\\") else b""
    segments = [
        segment.ljust(_NAME_SIZE, "_").encode("ascii") for segment in path.lstrip("\\").split(".")
    ]
    if any(len(segment) != _NAME_SIZE for segment in segments):
        raise ValueError(f"AML name {path!r}")
    match len(segments):
        case 1:
            return root + segments[0]
        case 2:
            return root + _DUAL_NAME_PREFIX + b"".join(segments)
        case count:
            return root + _MULTI_NAME_PREFIX + bytes((count,)) + b"".join(segments)


def integer(value: int) -> bytes:
    """Return an integer of up to 64 bits in its shortest encoding."""
    if value in (0, 1):
        return bytes((value,))
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << (8 * size):
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"AML integer {value:#x}")


def string(text: str) -> bytes:
    """Return an ASCII string."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """Return the 32-bit integer that stands for a PNP identifier such as PNP0A08."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return b"\x0c" + value.to_bytes(4, "big")


def buffer(data: bytes) -> bytes:
    """Return a buffer with its contents."""
    return b"\x11" + _package_length(integer(len(data)) + data)


def package(*items: bytes) -> bytes:
    """Return a package of up to 255 elements."""
    return encoded_package(len(items), b"".join(items))


def encoded_package(count: int, items: bytes) -> bytes:
    """Return a package of `count` elements whose encodings follow each other in `items`."""
    return b"\x12" + _package_length(bytes((count,)) + items)


def name(path: str, value: bytes) -> bytes:
    """Declare a named object."""
    return b"\x08" + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """Open an existing scope."""
    return b"\x10" + _package_length(name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Declare a device."""
    return b"\x5b\x82" + _package_length(name_string(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes, is_serialized: bool = False) -> bytes:
    """Declare a method of up to seven arguments; one that declares names is serialized."""
    flags = arguments | (0x08 if is_serialized else 0)
    return b"\x14" + _package_length(name_string(path) + bytes((flags,)) + b"".join(terms))


def store(value: bytes, target: bytes) -> bytes:
    """Store `value` in `target`."""
    return b"\x70" + value + target


def return_(value: bytes) -> bytes:
    """Return from a method."""
    return b"\xa4" + value


def if_(predicate: bytes, *terms: bytes) -> bytes:
    """Evaluate `terms` if `predicate` is not zero."""
    return b"\xa0" + _package_length(predicate + b"".join(terms))


def equal(left: bytes, right: bytes) -> bytes:
    """Compare two values."""
    return b"\x93" + left + right


def bit_or(left: bytes, right: bytes, target: bytes) -> bytes:
    """Combine two integers into `target`."""
    return b"\x7d" + left + right + target


def notify(path: str, value: int) -> bytes:
    """Tell the driver of the device at `path` what happened. Source: ACPI 6.5 §20.2.5.3."""
    return b"\x86" + name_string(path) + integer(value)


def create_dword_field(source: bytes, offset: int, path: str) -> bytes:
    """Name four bytes at `offset` of a buffer."""
    return b"\x8a" + source + integer(offset) + name_string(path)


def resources(*descriptors: bytes) -> bytes:
    """Return a resource template."""
    return buffer(b"".join(descriptors) + END_TAG)


def io_ports(base: int, size: int) -> bytes:
    """Fixed I/O ports, decoded by all 16 address lines; at most 255."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, size)


def isa_irq(number: int) -> bytes:
    """An edge-triggered, active-high ISA interrupt that is not shared."""
    return struct.pack("<BH", 0x22, 1 << number)


def edge_interrupt(gsi: int) -> bytes:
    """Return an interrupt by its GSI: an edge, active high, not shared.

    Source: ACPI 6.5 §6.4.3.6
    """
    consumer, edge = 1 << 0, 1 << 1
    return b"\x89\x06\0" + bytes((consumer | edge, 1)) + gsi.to_bytes(4, "little")


def fixed_memory(base: int, size: int) -> bytes:
    """A fixed range of writable memory below 4 GiB."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, size)


_WINDOW_MEMORY, _WINDOW_IO, _WINDOW_BUS = 0, 1, 2
_FIXED_WINDOW = 0x0C  # minimum and maximum are fixed, positive decode, resource producer
_ENTIRE_RANGE = 0x03
_READ_WRITE = 0x01


def bus_numbers(first: int, last: int) -> bytes:
    """The PCI buses below a host bridge."""
    return _window(0x88, "H", _WINDOW_BUS, 0, first=first, last=last)


def io_window(base: int, size: int) -> bytes:
    """A range of I/O ports that a bridge passes on."""
    return _window(0x88, "H", _WINDOW_IO, _ENTIRE_RANGE, first=base, last=base + size - 1)


def memory_window32(base: int, size: int) -> bytes:
    """A range of memory below 4 GiB that a bridge passes on; not cacheable."""
    return _window(0x87, "I", _WINDOW_MEMORY, _READ_WRITE, first=base, last=base + size - 1)


def memory_window64(base: int, size: int) -> bytes:
    """A range of memory anywhere that a bridge passes on; not cacheable."""
    return _window(0x8A, "Q", _WINDOW_MEMORY, _READ_WRITE, first=base, last=base + size - 1)


def _window(tag: int, width: str, kind: int, flags: int, *, first: int, last: int) -> bytes:
    """Return an address space descriptor: granularity, minimum, maximum, translation, length."""
    fields = struct.pack(
        f"<BBB5{width}", kind, _FIXED_WINDOW, flags, 0, first, last, 0, last - first + 1
    )
    return struct.pack("<BH", tag, len(fields)) + fields


def uuid(text: str) -> bytes:
    """Return the buffer that ToUUID makes of `text`."""
    first, second, third, *rest = text.split("-")
    return buffer(
        int(first, 16).to_bytes(4, "little")
        + int(second, 16).to_bytes(2, "little")
        + int(third, 16).to_bytes(2, "little")
        + bytes.fromhex("".join(rest))
    )
