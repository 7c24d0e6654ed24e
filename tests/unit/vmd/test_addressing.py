"""Addresses of local interfaces, against the table of OpenBSD's behaviour, section 12.4."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.config.values import prefix4_of, prefix6_of
from vmd.rules.addressing import (
    DEFAULT_PREFIX,
    RangeError,
    host_lladdr,
    is_host_name,
    local_addresses,
    made_lladdr,
    random_prefix6,
    subnet4,
    subnet6,
)
from vmm_kvm.net.ethernet import parse_lladdr

LLADDR = "fe:e1:bb:d1:23:45"


@pytest.mark.parametrize(
    ("prefix", "vm_id", "index", "host", "guest"),
    [
        ("100.64.0.0/10", 1, 0, "100.64.1.2", "100.64.1.3"),
        ("100.64.0.0/10", 1, 1, "100.64.1.4", "100.64.1.5"),
        ("100.64.0.0/10", 1, 126, "100.64.1.254", "100.64.1.255"),
        ("100.64.0.0/10", 256, 0, "100.65.0.2", "100.65.0.3"),
        ("100.64.0.0/10", 16383, 3, "100.127.255.8", "100.127.255.9"),
        ("10.1.0.0/16", 255, 0, "10.1.255.2", "10.1.255.3"),
        ("10.0.0.0/8", 65535, 0, "10.255.255.2", "10.255.255.3"),
        ("128.0.0.0/1", 1, 0, "128.0.1.2", "128.0.1.3"),
    ],
)
def test_ipv4(prefix: str, vm_id: int, index: int, host: str, guest: str) -> None:
    """The VM's id and the interface's index give the address; two addresses are a network."""
    found = local_addresses(prefix4_of(prefix), None, vm_id, index, LLADDR)
    assert (str(found.host4), str(found.guest4)) == (host, guest)
    assert found.host6 == found.guest6 == ""


@pytest.mark.parametrize(
    ("prefix", "vm_id", "index"),
    [
        ("100.64.0.0/10", 16384, 0),
        ("10.1.0.0/16", 256, 0),
        ("10.1.0.0/16", 1, 127),
        ("10.1.0.0/16", 1, -1),
        ("10.1.0.0/16", 1 << 24, 0),
    ],
)
def test_what_does_not_fit(prefix: str, vm_id: int, index: int) -> None:
    """An id beyond the prefix, or one interface too many, has no address."""
    text = f"dhcp address range exceeded, vm id {vm_id} interface {index}"
    with pytest.raises(RangeError, match=f"^{text}$"):
        local_addresses(prefix4_of(prefix), None, vm_id, index, LLADDR)


def test_ipv6() -> None:
    """The guest's IPv4 address is a part of the network; the guest makes its own address."""
    found = local_addresses(DEFAULT_PREFIX, prefix6_of("fd12:3456:789a:bcde::/64"), 1, 0, LLADDR)
    assert found.host6 == "fd12:3456:789a:bcde:6440:103:0:1"
    assert found.guest6 == "fd12:3456:789a:bcde:fce1:bbff:fed1:2345"


def test_a_random_prefix_is_a_unique_local_one() -> None:
    """The first byte is fd, the rest of 64 bits is as random as the given bytes."""
    prefix = random_prefix6(bytes(range(1, 8)))
    assert subnet6(prefix) == "fd01:203:405:607::/64"


@given(st.integers(1, 16383), st.integers(0, 126), st.integers(1, 16383), st.integers(0, 126))
def test_no_two_interfaces_share_a_network(one: int, first: int, other: int, second: int) -> None:
    """Two interfaces have no address in common, and both lie within the prefix."""
    prefix6 = prefix6_of("fd00::/64")
    a = local_addresses(DEFAULT_PREFIX, prefix6, one, first, LLADDR)
    b = local_addresses(DEFAULT_PREFIX, prefix6, other, second, LLADDR)
    host4 = IPv4Address(a.host4)
    assert host4 in IPv4Network(subnet4(DEFAULT_PREFIX))
    assert IPv4Network((int(host4), 31)).network_address == host4
    assert IPv6Address(a.host6) in IPv6Network(subnet6(prefix6))
    if (one, first) != (other, second):
        assert not {a.host4, a.guest4} & {b.host4, b.guest4}
        networks = [IPv6Network((int(IPv6Address(each.host6)) - 1, 96)) for each in (a, b)]
        assert networks[0] != networks[1]


def test_the_prefix_itself_is_no_address() -> None:
    """VM ids start at 1 and indices at 0: the network's own address is never used."""
    found = local_addresses(prefix4_of("10.1.0.0/16"), None, 1, 0, LLADDR)
    assert IPv4Address(found.host4) > IPv4Address("10.1.0.0")


def test_the_host_is_next_to_the_guest() -> None:
    """The host's Ethernet address is the guest's with one more in its last byte, which may wrap."""
    assert host_lladdr("fe:e1:bb:d1:23:45") == "fe:e1:bb:d1:23:46"
    assert host_lladdr("fe:e1:bb:d1:23:ff") == "fe:e1:bb:d1:23:00"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("web", True),
        ("web-1.example", True),
        ("a", False),
        ("", False),
        ("-web", False),
        ("web-", False),
        ("web_1", False),
        ("web..a", False),
        ("wéb", False),
        ("a" * 64, False),
    ],
)
def test_host_names(name: str, expected: bool) -> None:
    """A VM's name is the guest's host name only if it is a valid one."""
    assert is_host_name(name) == expected


def test_addresses_that_nobody_chose() -> None:
    """Generated addresses last over starts, and differ by host, owner, VM and interface."""

    def made(host: bytes = b"h", uid: int = 0, name: str = "web", index: int = 0) -> str:
        return made_lladdr(host, uid, name, index, ())

    found = [made(), made(b"other"), made(uid=1000), made(name="db"), made(index=1), made(index=3)]
    assert found[0] == made()
    assert len(set(found)) == len(found)
    assert [one[:11] for one in found] == ["fe:e1:bb:d1"] * 4 + ["fe:e1:bb:d2", "fe:e1:bb:d4"]
    assert all(parse_lladdr(one).hex(":") == one for one in found)


def test_an_address_that_is_taken_is_passed_over() -> None:
    """The next one is as lasting; if all were taken, one would be returned all the same."""
    first = made_lladdr(b"h", 0, "web", 0, ())
    second = made_lladdr(b"h", 0, "web", 0, {first})
    assert second != first
    assert made_lladdr(b"h", 0, "web", 0, {first}) == second

    class Everything:
        def __contains__(self, _lladdr: object) -> bool:
            return True

    assert made_lladdr(b"h", 0, "web", 0, Everything()).startswith("fe:e1:bb:d1:")
