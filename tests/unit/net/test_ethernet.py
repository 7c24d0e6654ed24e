"""Which frames a station wants."""

from __future__ import annotations

import pytest

from vmm_kvm.net.ethernet import BROADCAST, Filter, is_group, locked_filter, text

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
    """Each mode lets through what its name says, and nothing else."""
    targets = {MAC, OTHER, GROUP, OTHER_GROUP, BROADCAST}
    assert {target for target in targets if wanted.accepts(frame(target))} == accepted


def test_vlans() -> None:
    """Of tagged frames those of listed VLANs pass; VLAN 0 is none, and no list is all."""
    some = Filter(MAC, vlans=frozenset({5}))
    assert [vlan for vlan in (0, 4, 5) if some.accepts(frame(MAC, vlan))] == [0, 5]
    assert some.accepts(frame(MAC))
    assert Filter(MAC).accepts(frame(MAC, 4))


def test_text() -> None:
    """Addresses are shown as people write them."""
    assert text(MAC) == "fe:e1:bb:00:00:01"
    assert [is_group(address) for address in (MAC, GROUP, BROADCAST)] == [False, True, True]
