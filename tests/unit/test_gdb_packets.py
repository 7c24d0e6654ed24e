"""Packets of GDB's protocol, from any bytes in any pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_kvm.gdb import registers
from vmm_kvm.gdb.packets import (
    PACKET_MAX,
    Again,
    Damaged,
    Interrupt,
    OverflowedError,
    Packet,
    Reader,
    Received,
    framed,
)


def _read(*pieces: bytes) -> list[Received]:
    reader, found = Reader(), []
    for piece in pieces:
        reader.feed(piece)
        while (received := reader.next()) is not None:
            found.append(received)
    return found


@given(st.lists(st.binary(max_size=64), max_size=5), st.integers(1, 40))
def test_packets_come_as_they_were_sent(texts: list[bytes], size: int) -> None:
    """Packets are read unchanged, with any bytes, in any pieces."""
    data = b"".join(framed(text) for text in texts)
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert _read(*pieces) == [Packet(text) for text in texts]


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_any_bytes_are_read_without_an_end(pieces: list[bytes]) -> None:
    """Bytes that no debugger sends yield packets, or nothing, and never an exception."""
    for received in _read(*pieces):
        assert isinstance(received, Packet | Interrupt | Damaged | Again)


def test_what_stands_between_packets() -> None:
    """Acknowledgements are skipped; an interrupt, a resend and a wrong checksum are reported."""
    assert _read(b"+++\x03$g#67-$g#68+$g#6", b"7") == [
        *(Interrupt(), Packet(b"g"), Again(), Damaged(), Packet(b"g"))
    ]


@pytest.mark.parametrize("data", [b"$" + b"a" * PACKET_MAX, b"+" * (5 * PACKET_MAX)])
def test_a_packet_without_an_end_is_refused(data: bytes) -> None:
    """Neither a long packet nor unread bytes fill memory."""
    with pytest.raises(OverflowedError):
        _read(data, data)


def test_the_description_has_every_register_once() -> None:
    """GDB numbers registers in the order of the description, which is ours."""
    text = registers.description().decode()
    places = [text.index(f'name="{register.name}" bitsize') for register in registers.REGISTERS]
    assert places == sorted(places)
    assert text.count("<reg ") == len(places) == len(set(places))
