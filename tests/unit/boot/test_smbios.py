"""SMBIOS tables: sound by our own reading, and as dmidecode reads them."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import uuid as uuid_module
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_kvm.arch.x86 import layout
from vmm_kvm.arch.x86.smbios import SmbiosTables, build_smbios, name_uuid
from vmm_kvm.bits import GIB, MIB

UUID = bytes(range(16))
MEMORY = ((0, 3 * GIB), (4 * GIB, GIB))


def structures(tables: SmbiosTables) -> list[tuple[int, int, bytes, list[bytes]]]:
    """Read the structures: type, handle, formatted area after the header, strings."""
    data, at, found = tables.tables, 0, []
    while at < len(data):
        kind, length, handle = struct.unpack_from("<BBH", data, at)
        end = data.index(b"\0\0", at + length)
        strings = data[at + length : end].split(b"\0") if end > at + length else []
        found.append((kind, handle, data[at + 4 : at + length], strings))
        at = end + 2
    assert at == len(data)
    return found


def strings_of(tables: SmbiosTables, kind: int) -> list[bytes]:
    """Return the strings of the only structure of a type."""
    (strings,) = (found for number, _, _, found in structures(tables) if number == kind)
    return strings


def test_the_anchor_leads_to_the_tables() -> None:
    """Both checksums are right; address, length, count and largest structure agree."""
    tables = build_smbios(UUID, "serial-1", 4, MEMORY, 0xF0000)
    anchor = tables.anchor
    assert (anchor[:4], anchor[16:21], len(anchor), anchor[5]) == (b"_SM_", b"_DMI_", 31, 31)
    assert sum(anchor) % 256 == 0
    assert sum(anchor[16:]) % 256 == 0
    (largest,) = struct.unpack_from("<H", anchor, 8)
    length, address, count = struct.unpack_from("<HIH", anchor, 22)
    assert (address, length) == (0xF0020, len(tables.tables))
    assert tables.blob[address - 0xF0000 :] == tables.tables
    found = structures(tables)
    assert count == len(found)
    assert largest == max(len(b"".join(s)) + len(s) + len(f) + 5 for _, _, f, s in found)


def test_each_structure_has_a_handle_of_its_own() -> None:
    """Every type is there, the end last, and no handle occurs twice."""
    found = structures(build_smbios(UUID, "serial-1", 4, MEMORY, 0xF0000))
    assert [kind for kind, *_ in found] == [0, 1, 3, 4, 16, 17, 19, 19, 32, 127]
    assert len({handle for _, handle, *_ in found}) == len(found)


def test_firmware_describes_itself() -> None:
    """Without a firmware's place there is no type 0, and firmware fills in the address."""
    tables = build_smbios(UUID, "serial-1", 4, MEMORY, None)
    assert 0 not in [kind for kind, *_ in structures(tables)]
    assert struct.unpack_from("<I", tables.anchor, 24) == (0,)


def test_a_machine_without_a_serial_number() -> None:
    """Without a serial number there is no string for one: an empty one would end the table."""
    tables = build_smbios(UUID, "", 1, MEMORY, None)
    assert strings_of(tables, 1) == [b"OpenBSD", b"VMM"]


@given(st.text(max_size=100))
def test_any_text_is_a_serial_number(serial: str) -> None:
    """Text that a table cannot hold is replaced or cut; the structures stay sound."""
    tables = build_smbios(UUID, serial, 1, MEMORY, None)
    strings = strings_of(tables, 1)
    assert len(strings) == 2 + bool(serial)
    assert all(0x20 <= byte < 0x7F for byte in b"".join(strings))
    assert max(map(len, strings)) <= 64
    assert [kind for kind, *_ in structures(tables)][-1] == 127


def test_there_is_room_behind_the_acpi_tables() -> None:
    """The largest machine's tables end below 1 MiB."""
    blob = build_smbios(UUID, "x" * 64, 64, MEMORY, layout.SMBIOS_START).blob
    assert layout.SMBIOS_START % 16 == 0
    assert layout.SMBIOS_START + len(blob) <= layout.HIGH_MEMORY_START


@pytest.fixture
def dmidecode() -> str:
    """The path of dmidecode."""
    found = shutil.which("dmidecode", path="/usr/bin:/usr/sbin:/sbin")
    if found is None:
        pytest.skip("dmidecode is not installed")
    return found


def decode(dmidecode: str, memory: Sequence[tuple[int, int]], path: Path) -> str:
    """Return dmidecode's output for a machine with four vCPUs."""
    path.write_bytes(build_smbios(UUID, "serial-1", 4, memory, 0).blob)
    done = subprocess.run(
        [dmidecode, "--from-dump", path], check=True, capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.stdout.replace("iB\n", "B\n")  # version 3.7 has MiB, where 3.4 has MB


def test_dmidecode_agrees(dmidecode: str, tmp_path: Path) -> None:
    """By dmidecode identity, processors and memory are the configured ones, without fault."""
    text = decode(dmidecode, MEMORY, tmp_path / "dump")
    for line in (
        "SMBIOS 2.8 present.",
        "Manufacturer: OpenBSD",
        "Product Name: VMM",
        "Serial Number: serial-1",
        "UUID: 00010203-0405-0607-0809-0a0b0c0d0e0f",
        "System is a virtual machine",
        "Core Count: 4",
        "Maximum Capacity: 4 GB",
        "Size: 4 GB",
        "Ending Address: 0x0013FFFFFFF",
        "Status: No errors detected",
    ):
        assert line in text
    assert "OUT OF SPEC" not in text
    assert "TRUNCATED" not in text


@pytest.mark.parametrize(
    ("size", "told"),
    [(512 * MIB, "512 MB"), (31 * GIB, "31 GB"), (32 * GIB, "32 GB"), (128 * GIB, "128 GB")],
    ids=str,
)
def test_sizes_around_the_limit_of_a_field(
    dmidecode: str, tmp_path: Path, size: int, told: str
) -> None:
    """From 32767 MiB on a module's size is in another field."""
    text = decode(dmidecode, ((0, size),), tmp_path / "dump")
    assert re.findall(r"\t(?:Size|Maximum Capacity|Range Size): (.*)", text) == [told] * 3


def test_a_name_has_one_uuid() -> None:
    """The same names give the same UUID, of version 8 and the usual variant; others differ."""
    made = name_uuid("host", "alpine")
    assert made == name_uuid("host", "alpine")
    assert made not in (name_uuid("host", "debian"), name_uuid("hostalpine"))
    read = uuid_module.UUID(bytes=made)
    assert (read.version, read.variant) == (8, uuid_module.RFC_4122)
