"""Router advertisements, against scapy."""

from __future__ import annotations

from ipaddress import IPv6Address

from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import (
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptRDNSS,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)
from scapy.layers.l2 import Ether

from vmm_kvm.net.router import Router, advertisement, is_solicitation, link_local

GUEST = bytes.fromhex("fee1bbd12345")
HOST = bytes.fromhex("fee1bbd12346")
ADDRESS = IPv6Address("fd12:3456:789a:bcde:6440:103::1").packed
ROUTER = Router(HOST, link_local(HOST), ADDRESS[:8] + bytes(8), ADDRESS)


def solicitation(source: str = "fe:e1:bb:d1:23:45", hops: int = 255, to: str = "ff02::2") -> bytes:
    """Return the solicitation of a guest whose interface comes up."""
    packet = Ether(src=source, dst="33:33:00:00:00:02") / IPv6(src="::", dst=to, hlim=hops)
    return bytes(packet / ICMPv6ND_RS())


def test_what_is_advertised() -> None:
    """The host is the router, guests make addresses in 64 bits, DNS is at the host's address."""
    frame = advertisement(ROUTER)
    packet = Ether(frame)
    again = Ether(frame)
    del again[ICMPv6ND_RA].cksum
    assert bytes(again) == frame, "the checksum is wrong"
    assert (packet.src, packet.dst) == ("fe:e1:bb:d1:23:46", "33:33:00:00:00:01")
    assert packet[IPv6].src == "fe80::fce1:bbff:fed1:2346"
    assert (packet[IPv6].dst, packet[IPv6].hlim) == ("ff02::1", 255)
    assert packet[ICMPv6ND_RA].routerlifetime == 1800
    assert (packet[ICMPv6ND_RA].M, packet[ICMPv6ND_RA].O) == (0, 0)
    assert packet[ICMPv6NDOptSrcLLAddr].lladdr == "fe:e1:bb:d1:23:46"
    first = packet[ICMPv6NDOptPrefixInfo]
    second = first.payload
    assert (first.prefix, first.prefixlen, first.A, first.L) == ("fd12:3456:789a:bcde::", 64, 1, 0)
    host_network = "fd12:3456:789a:bcde:6440:103::"
    assert (second.prefix, second.prefixlen, second.A, second.L) == (host_network, 96, 0, 1)
    assert packet[ICMPv6NDOptRDNSS].dns == ["fd12:3456:789a:bcde:6440:103:0:1"]


def test_the_end_of_a_router() -> None:
    """A lifetime of zero ends the router."""
    assert Ether(advertisement(ROUTER, lifetime_s=0))[ICMPv6ND_RA].routerlifetime == 0


def test_solicitations() -> None:
    """Only the guest's own solicitation counts, none through a router or from others."""
    assert is_solicitation(solicitation(), GUEST)
    assert not is_solicitation(solicitation(source="fe:e1:bb:d1:23:44"), GUEST)
    assert not is_solicitation(solicitation(hops=254), GUEST)
    assert not is_solicitation(solicitation(to="ff02::1"), GUEST)
    assert not is_solicitation(solicitation()[:60], GUEST)
    assert not is_solicitation(advertisement(ROUTER), HOST)


@given(st.binary(max_size=200))
def test_any_bytes_are_no_solicitation(data: bytes) -> None:
    """Any frame is read within its bounds."""
    assert not is_solicitation(data, GUEST)
