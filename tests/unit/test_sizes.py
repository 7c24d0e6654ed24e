"""Sizes read and written as OpenBSD's scan_scaled(3) and fmt_scaled(3) do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.config.sizes import SizeError, fmt_scaled, scan_scaled

MIB = 1 << 20
GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024", 1024),
        ("512M", 512 * MIB),
        ("512m", 512 * MIB),
        (" 1G", GIB),
        ("4.5G", 4831838208),
        (".5G", 512 * MIB),
        ("1.9", 1),
        ("1G ", GIB),
        ("1G!", GIB),
        ("+1K", 1024),
        ("-1K", -1024),
        ("0", 0),
        ("1B", 1),
        ("2T", 2 << 40),
    ],
)
def test_scan_scaled(text: str, size: int) -> None:
    """A size is a number with at most one point and one unit; a bare number is bytes."""
    assert size == scan_scaled(text)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "Invalid argument"),
        ("G", "Invalid argument"),
        (".", "Invalid argument"),
        ("1GB", "Invalid argument"),
        ("1.2.3", "Invalid argument"),
        ("--1", "Invalid argument"),
        ("1X", "Invalid argument"),
        ("9223372036854775808", "Result too large"),
        ("111111111111111111111", "Result too large"),
        ("8E", "Result too large"),
    ],
)
def test_scan_scaled_refuses(text: str, error: str) -> None:
    """Text that is no size, or beyond 64 bits, is an error with strerror's text."""
    with pytest.raises(SizeError, match=f"^{error}$"):
        scan_scaled(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1.0K"),
        (512 * MIB, "512M"),
        (514 * MIB, "514M"),
        (GIB, "1.0G"),
        (GIB + 2 * MIB, "1.0G"),
        (4831838208, "4.5G"),
        (100 * GIB, "100G"),
        (10239, "10.0K"),
        (-1024, "-1.0K"),
    ],
)
def test_fmt_scaled(size: int, text: str) -> None:
    """A size is written with at most three digits and a unit."""
    assert text == fmt_scaled(size)


@given(st.integers(0, 1 << 62))
def test_what_is_written_reads_back_near(size: int) -> None:
    """Writing rounds to at most a tenth of the unit."""
    assert abs(scan_scaled(fmt_scaled(size)) - size) <= max(size * 0.06, 1)


@given(st.text())
def test_any_text_reads_or_is_refused(text: str) -> None:
    """No input raises anything but SizeError."""
    try:
        scan_scaled(text)
    except SizeError:
        return
