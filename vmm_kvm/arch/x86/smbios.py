"""SMBIOS tables: the machine's identity, its processors and its memory.

A direct boot finds them in guest memory, where every kernel looks: behind an anchor on a 16-byte
boundary from 0xf0000 on. Firmware takes both from fw_cfg and describes itself.

Version 2.8 with the 32-bit entry point, which all firmware and old guests know.

Source: SMBIOS 3.6 (DSP0134)
"""

import struct
from collections.abc import Sequence

from vmm_kvm.bits import KIB, MIB

VERSION = (2, 8)
MANUFACTURER = "OpenBSD"
PRODUCT = "VMM"
"""As guests of OpenBSD's vmd(8) see it; kernels and tools know virtual machines by it."""
STRING_MAX = 64
"""Characters (DSP0134 §6.1.3)."""

_RELEASE_DATE = "01/01/2026"
_NAMESPACE = "vmm-kvm"
_FNV_BASIS = 0x6C62_272E_07BB_0142_62B8_2175_6295_C58D
_FNV_PRIME = (1 << 88) + 0x13B
_FNV_MASK = (1 << 128) - 1
_ANCHOR = struct.Struct("<4sBBBBHB5s5sBHIHB")
_ANCHOR_CHECKSUM_AT = 4
_INTERMEDIATE_AT, _INTERMEDIATE_CHECKSUM_AT = 16, 21
_TABLES_AT = 32  # behind the anchor
_BCD_REVISION = VERSION[0] << 4 | VERSION[1]

_HEADER = struct.Struct("<BBH")
# Handles; the types of which there are several count from here.
_HANDLE_BIOS = 0x0000
_HANDLE_SYSTEM = 0x0100
_HANDLE_CHASSIS = 0x0300
_HANDLE_PROCESSOR = 0x0400
_HANDLE_MEMORY_ARRAY = 0x1000
_HANDLE_MEMORY_DEVICE = 0x1100
_HANDLE_MAPPED_ADDRESS = 0x1300
_HANDLE_BOOT = 0x2000
_HANDLE_END = 0x7F00
_NO_HANDLE = 0xFFFF
_NO_ERROR_HANDLE = 0xFFFE

_OTHER, _NONE, _SAFE = 1, 3, 3
_DETAIL_OTHER = 1 << 1
_CAPABLE_OF_64_BITS = 1 << 2
_BIOS_NOT_SPECIFIED = 1 << 3
_BIOS_IS_VIRTUAL = 1 << 4
_WAKE_UP_POWER_SWITCH = 6
_CENTRAL_PROCESSOR = 3
_SOCKET_POPULATED_ENABLED = 0x41
_SYSTEM_MEMORY = 3
_DIMM = 9
_RAM = 7
_NEEDS_EXTENDED_32 = 0xFFFF_FFFF
_NEEDS_EXTENDED_CAPACITY = 0x8000_0000
_NEEDS_EXTENDED_SIZE = 0x7FFF


class SmbiosTables:
    """The entry point and the structures that it leads to."""

    __slots__ = ("anchor", "tables")

    def __init__(self, anchor: bytes, tables: bytes) -> None:
        self.anchor = anchor
        self.tables = tables

    @property
    def blob(self) -> bytes:
        """Both as they lie in memory, for the base that they were built for."""
        return self.anchor.ljust(_TABLES_AT, b"\0") + self.tables


def name_uuid(*names: str) -> bytes:
    """Return the UUID, sixteen bytes, of `names`: equal names have equal UUIDs.

    FNV-1a with 128 bits: no secret depends on it, and importing hashlib would slow each start.

    Source: RFC 9562 §5.8, version 8
    """
    digest = _FNV_BASIS
    for byte in "\0".join((_NAMESPACE, *names)).encode(errors="surrogateescape"):
        digest = (digest ^ byte) * _FNV_PRIME & _FNV_MASK
    uuid = bytearray(digest.to_bytes(16, "big"))
    uuid[6] = uuid[6] & 0x0F | 0x80
    uuid[8] = uuid[8] & 0x3F | 0x80
    return bytes(uuid)


class _Table:
    """Structures, one after the other, and their description in the entry point."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.count = 0
        self.largest = 0

    def add(self, kind: int, handle: int, body: bytes, strings: Sequence[str] = ()) -> None:
        """Append a structure: formatted area, then its strings. Source: DSP0134 §6.1."""
        encoded = b"".join(_encode(text) + b"\0" for text in strings) or b"\0"
        structure = _HEADER.pack(kind, _HEADER.size + len(body), handle) + body + encoded + b"\0"
        self.data += structure
        self.count += 1
        self.largest = max(self.largest, len(structure))


def _encode(text: str) -> bytes:
    """Return a string that a table can hold: printable ASCII, never empty."""
    kept = "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:STRING_MAX])
    return (kept or "Not Specified").encode("ascii")


def build_smbios(
    uuid: bytes,
    serial: str,
    cpus: int,
    memory: Sequence[tuple[int, int]],
    base: int | None,
) -> SmbiosTables:
    """Describe a machine.

    Args:
        uuid: sixteen bytes, in the order in which they are written down.
        serial: the system's serial number; empty means that it has none.
        cpus: vCPUs, 1 to 255.
        memory: (guest-physical address, bytes) of each range of RAM; multiples of 1 MiB.
        base: where the tables will lie, a multiple of 16 below 1 MiB. None leaves the place, and
            the description of the firmware, to firmware.
    """
    table = _Table()
    if base is not None:
        _add_bios(table)
    _add_system(table, uuid, serial)
    _add_processor(table, cpus)
    _add_memory(table, memory)
    table.add(32, _HANDLE_BOOT, bytes(6) + b"\0")  # booted without an error
    table.add(127, _HANDLE_END, b"")
    address = 0 if base is None else base + _TABLES_AT
    return SmbiosTables(_anchor(table, address), bytes(table.data))


def _anchor(table: _Table, address: int) -> bytes:
    """Return the 32-bit entry point. Source: DSP0134 §5.2.1."""
    anchor = bytearray(
        _ANCHOR.pack(
            b"_SM_",
            0,
            _ANCHOR.size,
            *VERSION,
            table.largest,
            0,  # entry point revision
            bytes(5),
            b"_DMI_",
            0,
            len(table.data),
            address,
            table.count,
            _BCD_REVISION,
        )
    )
    anchor[_INTERMEDIATE_CHECKSUM_AT] = -sum(anchor[_INTERMEDIATE_AT:]) & 0xFF
    anchor[_ANCHOR_CHECKSUM_AT] = -sum(anchor) & 0xFF
    return bytes(anchor)


def _add_bios(table: _Table) -> None:
    """Type 0: there is no firmware, which needs saying. Source: DSP0134 §7.1."""
    body = struct.pack(
        "<BBHBBQBBBBBB",
        1,  # vendor
        2,  # version
        0,  # segment
        3,  # release date
        0,  # 64 KiB of ROM
        _BIOS_NOT_SPECIFIED,
        0,
        _BIOS_IS_VIRTUAL,
        *(0xFF, 0xFF),  # no release number
        *(0xFF, 0xFF),  # no embedded controller
    )
    table.add(0, _HANDLE_BIOS, body, (MANUFACTURER, "vmm-kvm direct boot", _RELEASE_DATE))


def _add_system(table: _Table, uuid: bytes, serial_number: str) -> None:
    """Types 1 and 3: system and chassis. Source: DSP0134 §7.2, §7.4."""
    serial = (serial_number,) if serial_number else ()
    # The first three fields of a UUID are little-endian numbers here.
    encoded_uuid = uuid[3::-1] + uuid[5:3:-1] + uuid[7:5:-1] + uuid[8:]
    body = struct.pack(
        "<BBBB16sBBB", 1, 2, 0, 3 if serial else 0, encoded_uuid, _WAKE_UP_POWER_SWITCH, 0, 0
    )
    table.add(1, _HANDLE_SYSTEM, body, (MANUFACTURER, PRODUCT, *serial))
    body = struct.pack(
        "<BBBBBBBBBIBBBBB",
        1,  # manufacturer
        _OTHER,
        0,
        2 if serial else 0,
        0,
        _SAFE,  # boot-up, power supply, thermal state
        _SAFE,
        _SAFE,
        _NONE,  # security
        0,
        0,  # height, power cords: unspecified
        0,
        0,  # contained elements
        0,
        0,
    )
    table.add(3, _HANDLE_CHASSIS, body, (MANUFACTURER, *serial))


def _add_processor(table: _Table, cpus: int) -> None:
    """Type 4: one package with a core for each vCPU. Source: DSP0134 §7.5."""
    body = struct.pack(
        "<BBBBQBBHHHBBHHHBBBBBBHH",
        1,  # socket
        _CENTRAL_PROCESSOR,
        _OTHER,  # family
        2,  # manufacturer
        0,  # CPUID says it
        0,
        0,  # voltage, clock and speeds: unknown
        0,
        0,
        0,
        _SOCKET_POPULATED_ENABLED,
        _OTHER,
        *(_NO_HANDLE, _NO_HANDLE, _NO_HANDLE),  # caches: CPUID says it
        *(0, 0, 0),  # serial number, asset tag, part number
        *(cpus, cpus, cpus),  # cores, enabled ones, threads
        _CAPABLE_OF_64_BITS,
        _OTHER,  # family, again
    )
    table.add(4, _HANDLE_PROCESSOR, body, ("CPU 0", MANUFACTURER))


def _add_memory(table: _Table, ranges: Sequence[tuple[int, int]]) -> None:
    """Types 16, 17 and 19: one array with one module. Source: DSP0134 §7.17, §7.18, §7.20."""
    size = sum(length for _, length in ranges)
    capacity, extended_capacity = _or_extended(size, KIB, _NEEDS_EXTENDED_CAPACITY)
    body = struct.pack(
        "<BBBIHHQ",
        _OTHER,  # location
        _SYSTEM_MEMORY,
        _NONE,  # error correction
        capacity,
        _NO_ERROR_HANDLE,
        1,  # devices
        extended_capacity * KIB,
    )
    table.add(16, _HANDLE_MEMORY_ARRAY, body)
    short_size, extended_size = _or_extended(size, MIB, _NEEDS_EXTENDED_SIZE)
    body = struct.pack(
        "<HHHHHBBBBBHHBBBBBIHHHH",
        _HANDLE_MEMORY_ARRAY,
        _NO_ERROR_HANDLE,
        *(0xFFFF, 0xFFFF),  # widths: unknown
        short_size,
        _DIMM,
        0,  # not one of a set
        1,  # locator
        0,
        _RAM,
        _DETAIL_OTHER,
        0,  # speed: unknown
        2,  # manufacturer
        *(0, 0, 0),  # serial number, asset tag, part number
        0,  # ranks: unknown
        extended_size,
        0,  # configured speed
        *(0, 0, 0),  # voltages
    )
    table.add(17, _HANDLE_MEMORY_DEVICE, body, ("DIMM 0", MANUFACTURER))
    for number, (address, length) in enumerate(ranges):
        last = address + length - 1
        is_far = last // KIB >= _NEEDS_EXTENDED_32
        body = struct.pack(
            "<IIHBQQ",
            _NEEDS_EXTENDED_32 if is_far else address // KIB,
            _NEEDS_EXTENDED_32 if is_far else last // KIB,
            _HANDLE_MEMORY_ARRAY,
            1,  # devices in a row
            address if is_far else 0,
            last if is_far else 0,
        )
        table.add(19, _HANDLE_MAPPED_ADDRESS + number, body)


def _or_extended(size: int, unit: int, limit: int) -> tuple[int, int]:
    """Return a size in units, for its field and for the extended field; one of them is in use."""
    units = size // unit
    return (units, 0) if units < limit else (limit, units)
