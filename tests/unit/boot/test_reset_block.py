"""Where other vCPUs start with SEV-ES: OVMF's table of GUIDs, whole, cut and forged."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.boot.images import guided_table
from vmm_kvm.arch.x86.reset_block import other_vcpus

FOOTER = UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
BLOCK = UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
SECRET = UUID("4c2eb361-7d9b-4cc3-8081-127c90d3d294")
ADDRESS = 0x0080_B004


def rom(table: bytes, size: int = 4096) -> bytes:
    """Return an image with a table in its place."""
    return (table + bytes(32)).rjust(size, b"\xff")


@pytest.mark.parametrize("others", [(), ((SECRET, bytes(8)),), ((SECRET, b""), (SECRET, b"x" * 9))])
def test_the_entry_is_found(others: tuple[tuple[UUID, bytes], ...]) -> None:
    """The address is split into a code segment's base and an offset, as after a SIPI."""
    own = (BLOCK, ADDRESS.to_bytes(4, "little"))
    for entries in ((own, *others), (*others, own)):
        entry = other_vcpus(rom(guided_table(*entries)))
        assert entry is not None
        assert (entry.code.base, entry.rip, entry.code.limit) == (0x80_0000, 0xB004, 0xFFFF)
        assert entry.cr0 & 1 == 0


@pytest.mark.parametrize("path", sorted(Path("/usr/share/OVMF").glob("OVMF_CODE*.fd")), ids=str)
def test_builds_of_ovmf(path: Path) -> None:
    """Distributions' OVMF has the entry, with an address in RAM that it fills before a SIPI."""
    entry = other_vcpus(path.read_bytes())
    assert entry is not None
    assert entry.code.base + entry.rip < 16 << 20


def test_without_the_entry() -> None:
    """Without a table, without the entry, or with one too short there is no address."""
    assert other_vcpus(b"") is None
    assert other_vcpus(bytes(64 << 10)) is None
    assert other_vcpus(rom(guided_table((SECRET, bytes(8))))) is None
    assert other_vcpus(rom(guided_table((BLOCK, b"abc")))) is None


@pytest.mark.parametrize("size", [0, 1, 17, 18, 23, 40, 4000, 0xFFFF])
def test_sizes_of_no_sense(size: int) -> None:
    """An entry or a table that is too small or too large ends the search."""
    table = bytearray(guided_table((BLOCK, bytes(4)), (SECRET, bytes(5))))
    secret_at, footer_at = len(table) - 36, len(table) - 18
    for at in (secret_at, footer_at):
        changed = bytearray(table)
        changed[at : at + 2] = size.to_bytes(2, "little")
        if (at, size) not in {(secret_at, 23), (footer_at, 0xFFFF), (footer_at, 4000)}:
            assert other_vcpus(rom(bytes(changed))) is None, (at, size)
        other_vcpus(rom(bytes(changed), len(changed) + 32))


@given(st.binary(max_size=200), st.integers(0, 60))
def test_any_bytes(data: bytes, cut: int) -> None:
    """Nothing in an image raises."""
    table = guided_table((BLOCK, bytes(4)))
    other_vcpus(data)
    other_vcpus(data + table + bytes(32))
    other_vcpus((table + data)[cut:] + bytes(32))
