"""The filter of a station: frames that pass it."""

from __future__ import annotations

import pytest

from vmm_kvm.net.ethernet import BROADCAST, Filter, is_group, locked_filter, parse_lladdr, text

MAC = bytes.fromhex("fee1bb000001")
OTHER = bytes.fromhex("fee1bb000002")
GROUP = bytes.fromhex("01005e000001")
OTHER_GROUP = bytes.fromhex("01005e000002")
QUIET = Filter(MAC, is_promiscuous=False)


def frame(target: bytes, vlan: int | None = None) -> bytes:
    """Return the head of a frame to `target`."""
    tag = b"" if vlan is None else b"\x81\x00" + vlan.to_bytes(2, "big")
    return (target + OTHER + tag + b"\x08\x00").ljust(18, b"\0")


@pytest.mark.parametrize(
    ("wanted", "accepted"),
    [
        (Filter(MAC), {MAC, OTHER, GROUP, OTHER_GROUP, BROADCAST}),
        (QUIET, {MAC, BROADCAST}),
        (QUIET._replace(has_all_group=True), {MAC, GROUP, OTHER_GROUP, BROADCAST}),
        (QUIET._replace(has_all_unicast=True), {MAC, OTHER, BROADCAST}),
        (QUIET._replace(unicast=frozenset({OTHER})), {MAC, OTHER, BROADCAST}),
        (QUIET._replace(group=frozenset({GROUP})), {MAC, GROUP, BROADCAST}),
        (QUIET._replace(has_no_broadcast=True), {MAC}),
        (QUIET._replace(has_no_unicast=True, has_all_unicast=True), {BROADCAST}),
        (QUIET._replace(has_no_group=True, has_all_group=True), {MAC, BROADCAST}),
        (locked_filter(MAC), {MAC, GROUP, OTHER_GROUP, BROADCAST}),
    ],
)
def test_targets(wanted: Filter, accepted: set[bytes]) -> None:
    """Each mode passes the frames of its name, and no others."""
    targets = {MAC, OTHER, GROUP, OTHER_GROUP, BROADCAST}
    assert {target for target in targets if wanted.accepts(frame(target))} == accepted


def test_vlans() -> None:
    """Of tagged frames those of listed VLANs pass; VLAN 0 counts as untagged, no list as all."""
    some = Filter(MAC, vlans=frozenset({5}))
    assert [vlan for vlan in (0, 4, 5) if some.accepts(frame(MAC, vlan))] == [0, 5]
    assert some.accepts(frame(MAC))
    assert Filter(MAC).accepts(frame(MAC, 4))


def test_text() -> None:
    """Addresses are shown in the usual notation."""
    assert text(MAC) == "fe:e1:bb:00:00:01"
    assert [is_group(address) for address in (MAC, GROUP, BROADCAST)] == [False, True, True]


def test_addresses_of_stations() -> None:
    """Six parts of one or two digits, of either case, are an address."""
    assert parse_lladdr("0:1:2:a:B:Ff") == bytes.fromhex("0001020a0bff")
    assert parse_lladdr(text(b"\xfe\xe1\xbb\xd1\x00\x01")) == b"\xfe\xe1\xbb\xd1\x00\x01"


@pytest.mark.parametrize(
    "written",
    [
        *("", "fee1bb000001", "fe:e1:bb:00:00", "fe:e1:bb:00:00:01:02", "fe:e1:bb:00:00:001"),
        *("fe:e1:bb:00:00:0g", "fe:e1:bb:00:00:", "fe-e1-bb-00-00-01", " fe:e1:bb:00:00:01"),
        *("01:00:00:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "0:0:0:0:0:0"),
    ],
)
def test_what_no_station_has(written: str) -> None:
    """Other notations, group addresses, broadcast and zero are refused."""
    with pytest.raises(ValueError, match=r"^invalid address: "):
        parse_lladdr(written)
