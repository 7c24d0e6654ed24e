"""Reading of captures and counters in tests/campaigns/captures.py."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.campaigns.captures import Frame, checksum_errors, differences, frames

A, B = bytes(6) + b"aaaaaa", bytes(6) + b"bbbbbb"
SENT: list[Frame] = [(100, A + b"1"), (60, B + b"1"), (100, A + b"2"), (100, A + b"3")]


def test_frames_of_a_capture(tmp_path: Path) -> None:
    """Each frame has its length on the wire, and its kept bytes; a cut one does not count."""
    head = struct.pack("<8xII", 3, 1500)
    place = tmp_path / "capture"
    place.write_bytes(bytes(24) + head + b"abc" + head + b"def" + head[:9])
    assert frames(place) == [(1500, b"abc"), (1500, b"def")]


def test_the_same_frames() -> None:
    """Frames of two senders may change places; those that the tap has dropped may be missing."""
    assert differences(SENT, SENT, 2) == ([], 0)
    assert differences([SENT[1], SENT[0], *SENT[2:]], SENT, 0) == ([], 0)
    assert differences([SENT[0], SENT[1], SENT[3]], SENT, 1) == ([], 1)


@pytest.mark.parametrize(
    ("inside", "dropped", "expected"),
    [
        ([SENT[0], SENT[2], SENT[1]], 0, "1 frames are missing inside, 0 were dropped"),
        ([SENT[2], SENT[1], SENT[0], SENT[3]], 0, "of 61:61:61:61:61:61 3 frames inside"),
        ([*SENT[:3], (100, A + b"x")], 0, "inside 2: 100 bytes: "),
        ([*SENT[:3], (101, A + b"3")], 0, "inside 2: 101 bytes: "),
        ([*SENT, SENT[3]], 0, "4 frames inside, 3 outside"),
    ],
)
def test_other_frames(inside: list[Frame], dropped: int, expected: str) -> None:
    """A missing, changed, disordered or doubled frame is reported."""
    assert any(expected in line for line in differences(inside, SENT, dropped)[0])


def test_wrong_checksums() -> None:
    """Wrong checksums of every protocol are added up."""
    snmp = (
        "Ip: InReceives InHdrErrors\nIp: 900 1\nTcp: InSegs InCsumErrors\nTcp: 800 2\n"
        "Udp: InErrors InCsumErrors\nUdp: 7 4\n"
    )
    snmp6 = "Ip6InHdrErrors\t8\nUdp6InCsumErrors 16\nUdp6InErrors 99\n"
    assert checksum_errors(snmp, snmp6) == 31
