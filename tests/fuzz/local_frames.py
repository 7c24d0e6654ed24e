"""Fuzz target: frames that a guest sends to the host on a local interface: DHCP, IPv6, any other.

An answer goes to this guest alone, and lends its one address. The filter of a locked interface
passes frames to its lladdr, to groups and to all.
"""

from __future__ import annotations

from tests.campaigns.fuzz_local import FRAMES, mended
from tests.fuzz.inputs import Input
from tests.unit.net.test_dhcp import LEASE
from tests.unit.net.test_router import GUEST
from vmm_kvm.net import ethernet
from vmm_kvm.net.dhcp import answer, parse_options
from vmm_kvm.net.router import is_solicitation

_YOUR_ADDRESS = slice(14 + 20 + 8 + 16, 14 + 20 + 8 + 20)
_FILTER = ethernet.locked_filter(GUEST)
_HEADER_SIZE = 14


def run(data: bytes) -> None:
    """Send a frame; the first byte chooses whether it is mended first, and given a checksum."""
    given = Input(data)
    how = given.number(1)
    frame = given.rest()
    if how & 1:
        frame = mended(frame)
    reply = answer(frame, LEASE, is_summed=bool(how & 2))
    if reply is not None:
        assert reply[:12] == LEASE.guest_lladdr + LEASE.host_lladdr
        assert reply[_YOUR_ADDRESS] in {LEASE.guest, bytes(4)}
    is_solicitation(frame, GUEST)
    parse_options(frame)
    if len(frame) >= _HEADER_SIZE and _FILTER.accepts(frame[:_HEADER_SIZE]):
        assert frame[0] & 1 or frame[:6] == GUEST


def seeds() -> list[bytes]:
    """Return the requests of the campaign, mended and unchanged."""
    return [bytes([how]) + frame for frame in FRAMES for how in (0, 1, 2, 3)]
