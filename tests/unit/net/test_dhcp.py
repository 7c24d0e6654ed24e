"""The DHCP server of local interfaces, against scapy, an independent implementation."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from vmm_kvm.net import dhcp
from vmm_kvm.net.dhcp import Lease, MessageType, Option, answer, parse_options

GUEST = "fe:e1:bb:d1:23:45"
HOST = "fe:e1:bb:d1:23:46"
LEASE = Lease(
    bytes.fromhex(GUEST.replace(":", "")),
    bytes.fromhex(HOST.replace(":", "")),
    bytes([100, 64, 1, 3]),
    bytes([100, 64, 1, 2]),
    host_name=b"web",
)
XID = 0x1234_5678


class Ask(NamedTuple):
    """A request, with its possible faults."""

    kind: str | None = "discover"
    requested: str | None = None
    ethernet_to: str = "ff:ff:ff:ff:ff:ff"
    ethernet_from: str = GUEST
    ports: tuple[int, int] = (68, 67)
    op: int = 1
    htype: int = 1
    hlen: int = 6
    hops: int = 0
    chaddr: str = GUEST
    ciaddr: str = "0.0.0.0"
    file: bytes = b""
    padding: int = 0

    def frame(self) -> bytes:
        """Return the frame that scapy makes of it."""
        options: list[object] = []
        if self.kind is not None:
            options.append(("message-type", self.kind))
        if self.requested is not None:
            options.append(("requested_addr", self.requested))
        bootp = BOOTP(
            op=self.op,
            htype=self.htype,
            hlen=self.hlen,
            hops=self.hops,
            xid=XID,
            flags="B",
            ciaddr=self.ciaddr,
            chaddr=bytes.fromhex(self.chaddr.replace(":", "")),
            file=self.file,
        )
        packet = (
            Ether(dst=self.ethernet_to, src=self.ethernet_from)
            / IP(src="0.0.0.0", dst="255.255.255.255")
            / UDP(sport=self.ports[0], dport=self.ports[1])
            / bootp
        )
        if options:
            packet /= DHCP(options=[*options, "end", *["pad"] * self.padding])
        return bytes(packet)


def decoded(frame: bytes | None) -> tuple[Ether, dict[str, object]]:
    """Return an answer as scapy reads it, with checksums compared, and its options."""
    assert frame is not None
    packet = Ether(frame)
    again = Ether(frame)
    del again[IP].chksum, again[UDP].chksum
    assert bytes(again) == frame, "a checksum is wrong"
    options = packet[DHCP].options if DHCP in packet else []
    return packet, {each[0]: each[1] for each in options if isinstance(each, tuple)}


def test_discover_is_answered_by_an_offer() -> None:
    """The offer has the guest's address and all listed options, in the right fields."""
    packet, options = decoded(answer(Ask().frame(), LEASE))
    assert (packet.dst, packet.src) == (GUEST, HOST)
    assert (packet[IP].src, packet[IP].dst) == ("100.64.1.2", "100.64.1.3")
    assert (packet[IP].ttl, packet[IP].tos, packet[IP].id) == (16, 0x10, 0)
    assert (packet[UDP].sport, packet[UDP].dport) == (67, 68)
    bootp = packet[BOOTP]
    assert (bootp.op, bootp.htype, bootp.hlen, bootp.xid) == (2, 1, 6, XID)
    assert (bootp.yiaddr, bootp.siaddr, bootp.ciaddr) == ("100.64.1.3", "100.64.1.2", "0.0.0.0")
    assert bootp.chaddr[:6] == LEASE.guest_lladdr
    assert options == {
        "message-type": MessageType.OFFER,
        "lease_time": 0xFFFFFFFF,
        "server_id": "100.64.1.2",
        "subnet_mask": "255.255.255.254",
        "router": "100.64.1.2",
        "name_server": "100.64.1.2",
        "hostname": b"web",
    }
    assert len(bytes(packet[UDP].payload)) >= 300


@pytest.mark.parametrize(
    ("kind", "requested", "expected"),
    [
        ("request", None, MessageType.ACK),
        ("request", "100.64.1.3", MessageType.ACK),
        ("request", "100.64.1.4", MessageType.NAK),
        ("discover", "10.0.0.1", MessageType.OFFER),
        ("nak", None, MessageType.NAK),
        ("decline", None, None),
        ("release", None, None),
        ("inform", None, None),
    ],
)
def test_kinds_of_messages(kind: str, requested: str | None, expected: MessageType | None) -> None:
    """Only the guest's own address is acknowledged; messages that want no answer get none."""
    reply = answer(Ask(kind, requested).frame(), LEASE)
    if expected is None:
        assert reply is None
        return
    packet, options = decoded(reply)
    assert options["message-type"] == expected
    is_refusal = expected is MessageType.NAK
    assert packet[BOOTP].yiaddr == ("0.0.0.0" if is_refusal else "100.64.1.3")
    assert ("router" in options) != is_refusal


def test_bootp_is_answered_without_a_type() -> None:
    """A request without options gets an address, and neither type nor lease time."""
    packet, options = decoded(answer(Ask(None).frame(), LEASE))
    assert packet[BOOTP].yiaddr == "100.64.1.3"
    assert "message-type" not in options
    assert "lease_time" not in options
    assert options["router"] == "100.64.1.2"


def test_a_renewal_is_acknowledged() -> None:
    """A guest that has its address may ask the host by unicast."""
    ask = Ask("request", ethernet_to=HOST, ciaddr="100.64.1.3")
    assert decoded(answer(ask.frame(), LEASE))[1]["message-type"] == MessageType.ACK


def test_boot_file() -> None:
    """A guest that boots from the network gets the file's name; others do not."""
    lease = LEASE._replace(boot_file=dhcp.BOOT_FILE)
    assert decoded(answer(Ask().frame(), lease))[0][BOOTP].file.rstrip(b"\0") == b"auto_install"
    assert decoded(answer(Ask().frame(), LEASE))[0][BOOTP].file.rstrip(b"\0") == b""


def test_no_host_name() -> None:
    """A lease without a name has no such option."""
    assert "hostname" not in decoded(answer(Ask().frame(), LEASE._replace(host_name=b"")))[1]


@pytest.mark.parametrize(
    "ask",
    [
        Ask(ethernet_to="fe:e1:bb:d1:23:47"),
        Ask(ethernet_from="fe:e1:bb:d1:23:44"),
        Ask(ports=(67, 68)),
        Ask(ports=(1067, 67)),
        Ask(op=2),
        Ask(htype=6),
        Ask(hlen=7),
        Ask(hops=1),
        Ask(chaddr="fe:e1:bb:d1:23:44"),
        Ask(ciaddr="100.64.1.9"),
        Ask(file=b"pxeboot"),
        Ask(padding=1500),
    ],
    ids=lambda ask: str(
        [name for name in Ask._fields if getattr(ask, name) != getattr(Ask(), name)]
    ),
)
def test_what_is_not_answered(ask: Ask) -> None:
    """A frame for or from another station, or of another kind, is ignored."""
    assert answer(ask.frame(), LEASE) is None


def _with(at: int, value: int) -> Callable[[bytes], bytes]:
    return lambda frame: frame[:at] + bytes([value]) + frame[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        _with(12, 0x86),  # the frame's type
        _with(14, 0x65),  # version 6
        _with(14, 0x44),  # a header of 16 bytes
        _with(14, 0x4F),  # of 60, which is not its own
        _with(20, 0x20),  # more fragments
        _with(23, 6),  # TCP
        _with(24, 0xFF),  # the header's checksum
        _with(40, 0xFF),  # UDP's
        _with(38, 0xFF),  # UDP's length
        lambda frame: frame[:200],
        lambda frame: frame[:20],
        lambda _: b"",
    ],
)
def test_damaged_frames(damage: Callable[[bytes], bytes]) -> None:
    """A frame whose parts contradict each other is ignored."""
    frame = Ask().frame()
    assert answer(frame, LEASE) is not None
    assert answer(damage(frame), LEASE) is None


def test_a_checksum_that_is_left_to_hardware() -> None:
    """UDP's checksum is not verified if the kernel says that it is not computed yet."""
    frame = Ask().frame()
    frame = frame[:40] + b"\x12\x34" + frame[42:]
    assert answer(frame, LEASE) is None
    assert answer(frame, LEASE, is_summed=False) is not None


@given(st.binary(max_size=1600), st.booleans())
def test_any_bytes_do_no_harm(data: bytes, is_summed: bool) -> None:
    """Any frame of a guest is answered or not, and raises nothing."""
    assert answer(data, LEASE, is_summed=is_summed) is None


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8))
def test_damaged_requests_do_no_harm(changes: list[tuple[int, int]]) -> None:
    """A request with any bytes changed gets the one lease, or no answer."""
    frame = bytearray(Ask("request", "100.64.1.3", padding=40).frame())
    for at, value in changes:
        frame[at % len(frame)] = value
    reply = answer(bytes(frame), LEASE, is_summed=False)
    if reply is not None:
        assert Ether(reply)[BOOTP].yiaddr in {"100.64.1.3", "0.0.0.0"}


OPTIONS = st.lists(st.tuples(st.integers(1, 254), st.binary(max_size=255)), max_size=10)


@given(OPTIONS, st.integers(0, 5))
def test_options_read_as_they_were_written(options: list[tuple[int, bytes]], pads: int) -> None:
    """The first option of each number counts; padding between them is skipped."""
    field = dhcp.MAGIC
    expected: dict[int, bytes] = {}
    for number, value in options:
        field += bytes(pads) + bytes([number, len(value)]) + value
        expected.setdefault(number, value)
    assert parse_options(field + bytes([Option.END]) + b"\1\1\1") == expected


@given(st.binary(max_size=300))
def test_options_never_reach_beyond_the_field(data: bytes) -> None:
    """Lengths beyond the end are not followed."""
    found = parse_options(dhcp.MAGIC + data)
    assert sum(2 + len(value) for value in found.values()) <= len(data)


@given(st.binary(min_size=1, max_size=60), st.integers(0, 0xFFFFFFFF))
def test_scapy_reads_every_lease(name: bytes, xid: int) -> None:
    """Any host name and transaction is read back unchanged by scapy."""
    frame = Ask("request").frame()
    at = frame.index(struct.pack(">I", XID))
    frame = frame[:at] + struct.pack(">I", xid) + frame[at + 4 :]
    packet, options = decoded(answer(frame, LEASE._replace(host_name=name), is_summed=False))
    assert packet[BOOTP].xid == xid
    assert options["hostname"] == name
