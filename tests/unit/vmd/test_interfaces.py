"""The status of a VM's interfaces."""

from __future__ import annotations

from vmd.config.model import ForwardConfig, InterfaceConfig
from vmd.parent.interfaces import Counters, Interface, interface_infos, parse_counters
from vmd.wire.internal import LocalAddresses, MadeTap, TapSpec
from vmd.wire.messages import ForwardInfo, InterfaceInfo

LLADDR = "fe:e1:bb:d1:00:01"
SHOWN = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo \
colls carrier compressed
    lo:    5000      50    0    0    0     0          0         0     5000      50    0    0    0 \
    0       0          0
  tap3: 123456789012 9000    1    2    3     4          5         6     7000      70    8    9   10\
    11      12         13
  br:0:       1       2    0    0    0     0          0         0        3       4    0    0    0 \
    0       0          0
"""


def test_counters() -> None:
    """Each interface's columns are found, even with a colon in its name."""
    found = parse_counters(SHOWN)
    assert found.keys() == {"lo", "tap3", "br:0"}
    assert found["tap3"] == Counters(123456789012, 9000, 7000, 70, 9)
    assert found["br:0"] == Counters(1, 2, 3, 4, 0)


def test_an_interface_that_is_not_there() -> None:
    """A stopped VM has only configured values."""
    config = InterfaceConfig(
        is_local=True, lladdr=LLADDR, rdomain=3, forwards=(ForwardConfig("udp", 53, 5353),)
    )
    expected = InterfaceInfo(
        lladdr=LLADDR,
        is_local=True,
        rdomain=3,
        forwards=(ForwardInfo(protocol="udp", port=53, to_port=5353),),
    )
    assert interface_infos([config], []) == (expected,)


def test_an_interface_that_is_there() -> None:
    """A made interface has its name, its addresses and its switch's options."""
    local = LocalAddresses(
        host4="100.64.1.2",
        guest4="100.64.1.3",
        host_lladdr="fe:e1:bb:d1:00:02",
        host6="fd00::1",
        guest6="fd00::2",
    )
    spec = TapSpec(
        config=InterfaceConfig(lladdr=LLADDR, is_locked=True), alias="vm1-if0-x", local=local
    )
    interface = Interface(spec, MadeTap(name="no such tap", index=9), (), may_vhost=True)
    (found,) = interface_infos([InterfaceConfig(is_local=True, lladdr=LLADDR)], [interface])
    assert (found.tap, found.is_locked, found.received) == ("no such tap", True, 0)
    assert found.host_addresses == ("100.64.1.2/31", "fd00::1/96")
    assert found.guest_addresses == ("100.64.1.3/31", "fd00::2/64")
