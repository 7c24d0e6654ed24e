"""The first instruction of other vCPUs than the first in a VM with SEV-ES: the firmware names it.

Their registers are encrypted before the guest runs, so that a SIPI cannot set them. OVMF has a
table of GUIDs for such things, which ends 32 bytes before the end of its image, at the reset
vector's code. It is read backwards: a GUID, the size of the entry with both, its data.

Source: edk2 OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm, "SEV-ES Processor Reset support".
"""

import struct
from uuid import UUID

from vmm_kvm.arch.x86.entry import RESET_VECTOR, Entry
from vmm_kvm.bits import align_down

_TABLE_END = 32
_FOOTER = UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
_RESET_BLOCK = UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
_TAIL = struct.Struct("<H16s")
_ADDRESS_SIZE = 4
_SEGMENT_SIZE = 1 << 16


def other_vcpus(rom: bytes) -> Entry | None:
    """Return the registers of all vCPUs but the first, when the guest begins, with SEV-ES.

    None if the firmware `rom` does not say where they start.
    """
    block = _entry(rom, _RESET_BLOCK)
    if block is None or len(block) < _ADDRESS_SIZE:
        return None
    address = int.from_bytes(block[:_ADDRESS_SIZE], "little")
    base = align_down(address, _SEGMENT_SIZE)
    return RESET_VECTOR._replace(rip=address - base, code=RESET_VECTOR.code._replace(base=base))


def _entry(rom: bytes, wanted: UUID) -> bytes | None:
    """Return an entry's data; None if there is no table, no such entry, or one of no sense."""
    end = len(rom) - _TABLE_END
    footer = _tail(rom, end)
    if footer is None or footer[0] != _FOOTER:
        return None
    start, end = end - footer[1], end - _TAIL.size
    while (found := _tail(rom, end)) and _TAIL.size <= found[1] <= end - start:
        if found[0] == wanted:
            return rom[end - found[1] : end - _TAIL.size]
        end -= found[1]
    return None


def _tail(rom: bytes, end: int) -> tuple[UUID, int] | None:
    """Return GUID and size of the entry that ends at `end`."""
    if end < _TAIL.size:
        return None
    size, guid = _TAIL.unpack_from(rom, end - _TAIL.size)
    return UUID(bytes_le=guid), size
