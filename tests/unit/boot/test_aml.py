"""AML: encodings by the specification's grammar."""

from __future__ import annotations

import pytest

from vmm_kvm.arch.x86 import aml


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0x1_0000, "0c00000100"),
        (1 << 32, "0e0000000001000000"),
        ((1 << 64) - 1, "0effffffffffffffff"),
    ],
)
def test_integers(value: int, encoded: str) -> None:
    """An integer takes as few bytes as it needs."""
    assert bytes.fromhex(encoded) == aml.integer(value)


def test_integer_too_large() -> None:
    """AML has no integers of more than 64 bits."""
    with pytest.raises(ValueError, match="AML integer"):
        aml.integer(1 << 64)


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("RTC", b"RTC_"),
        ("\\_S5", b"\\_S5_"),
        ("\\_SB.PCI0", b"\\\x2e_SB_PCI0"),
        ("A.B.C", b"\x2f\x03A___B___C___"),
    ],
)
def test_names(path: str, encoded: bytes) -> None:
    """Segments are padded with underscores; names of two and more have prefixes of their own."""
    assert encoded == aml.name_string(path)


def test_name_too_long() -> None:
    """A segment has at most four characters."""
    with pytest.raises(ValueError, match="AML name"):
        aml.name_string("COMMA")


@pytest.mark.parametrize(
    ("size", "length"),
    [
        (62, "3f"),
        (63, "4104"),
        (4093, "4fff"),
        (4094, "810001"),
        (0x1F_FFFF, "c3000002"),
    ],
)
def test_package_lengths(size: int, length: str) -> None:
    """A length counts itself and the `size` bytes after it, in one to four bytes."""
    encoded = aml.if_(b"", bytes(size))
    assert (b"\xa0" + bytes.fromhex(length)).ljust(size + 1 + len(length) // 2, b"\0") == encoded


def test_package_too_long() -> None:
    """A length has 28 bits."""
    with pytest.raises(ValueError, match="AML package"):
        aml.buffer(bytes(1 << 28))


def test_eisa_id() -> None:
    """An EISA identifier is three letters of five bits and four hexadecimal digits."""
    assert bytes.fromhex("0c41d00a08") == aml.eisa_id("PNP0A08")


def test_uuid() -> None:
    """A UUID's first three parts are little-endian."""
    encoded = aml.uuid("33DB4D5B-1FF7-401C-9657-7441C03DD766")
    assert bytes.fromhex("5b4ddb33f71f1c4096577441c03dd766") == encoded[-16:]
