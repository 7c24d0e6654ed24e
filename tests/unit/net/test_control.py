"""virtio-net's control queue: a driver's commands, and their effects."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtio_driver import DriverQueue, PlainMemory
from vmm_kvm.errors import VirtqueueError
from vmm_kvm.net.ethernet import Filter, locked_filter
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.net_control import TABLE_MAX, NetControl

MAC = bytes.fromhex("fee1bb000001")
OTHER = bytes.fromhex("fee1bb000002")
GROUP = bytes.fromhex("01005e000001")
ALL = (1 << 64) - 1
COMMAND, ANSWER = 0x10000, 0x20000
OK, ERR = 0, 1


class RecordingPort:
    """Remembers its last settings."""

    def __init__(self) -> None:
        self.offloads = self.pairs = -1
        self.wanted: Filter | None = None
        self.is_gone = False

    def _check(self) -> None:
        if self.is_gone:
            raise OSError(errno.EBADFD, "gone")

    def set_guest_offloads(self, features: int) -> None:
        """Remember it."""
        self._check()
        self.offloads = features

    def set_pairs(self, count: int) -> None:
        """Remember it."""
        self._check()
        self.pairs = count

    def set_filter(self, wanted: Filter) -> None:
        """Remember it."""
        self._check()
        self.wanted = wanted


class Rig:
    """A control queue with its driver."""

    def __init__(self, *, pairs: int = 4, features: int = ALL, is_locked: bool = False) -> None:
        self.port = RecordingPort()
        self.control = NetControl(
            MAC, self.port, name="nic0", pairs=pairs, mtu=9000, is_locked=is_locked
        )
        self.control.start(features)
        self.memory = PlainMemory()
        self.queue = DriverQueue(self.memory)
        self.side = self.queue.device(self.memory)

    def ask(self, kind: int, code: int, data: bytes = b"") -> int:
        """Give a command; returns the answer."""
        command = bytes((kind, code)) + data
        self.memory.bytes[COMMAND : COMMAND + len(command)] = command
        self.memory.bytes[ANSWER] = 0xFF
        self.queue.add((COMMAND, len(command), False), (ANSWER, 1, True))
        self.control.process(self.side)
        assert [written for _, written in self.queue.used()] == [1]
        return self.memory.bytes[ANSWER]


def table(*groups: list[bytes]) -> bytes:
    """Return lists of addresses as a driver sends them."""
    return b"".join(struct.pack("<I", len(one)) + b"".join(one) for one in groups)


def test_configuration() -> None:
    """Address, link, queue pairs and MTU are at the specification's places."""
    rig = Rig()
    assert rig.control.config() == MAC + struct.pack("<HHH", 1, 4, 9000)
    rig.control.set_link(False)
    assert rig.control.config()[6] == 0


def test_it_begins_open() -> None:
    """Without a command, all frames are received, by one pair, with the negotiated offloads."""
    rig = Rig(features=1 << abi.VIRTIO_NET_F_GUEST_CSUM | 1 << abi.VIRTIO_NET_F_CSUM)
    assert rig.port.wanted == Filter(MAC)
    assert (rig.port.pairs, rig.port.offloads) == (1, 1 << abi.VIRTIO_NET_F_GUEST_CSUM)


@pytest.mark.parametrize(
    ("code", "field"),
    [
        (abi.VIRTIO_NET_CTRL_RX_PROMISC, "is_promiscuous"),
        (abi.VIRTIO_NET_CTRL_RX_ALLMULTI, "has_all_group"),
        (abi.VIRTIO_NET_CTRL_RX_ALLUNI, "has_all_unicast"),
        (abi.VIRTIO_NET_CTRL_RX_NOMULTI, "has_no_group"),
        (abi.VIRTIO_NET_CTRL_RX_NOUNI, "has_no_unicast"),
        (abi.VIRTIO_NET_CTRL_RX_NOBCAST, "has_no_broadcast"),
    ],
)
def test_receive_modes(code: int, field: str) -> None:
    """Each mode can be switched on and off, and reaches the port."""
    rig = Rig()
    for value in (1, 0):
        assert rig.ask(abi.VIRTIO_NET_CTRL_RX, code, bytes((value,))) == OK
        assert getattr(rig.port.wanted, field) is bool(value)


def test_address_table() -> None:
    """Both lists replace the former ones; too long ones let all frames in."""
    rig = Rig()
    kind, code = abi.VIRTIO_NET_CTRL_MAC, abi.VIRTIO_NET_CTRL_MAC_TABLE_SET
    assert rig.ask(kind, code, table([OTHER], [GROUP])) == OK
    assert rig.control.filter.unicast == {OTHER}
    assert rig.control.filter.group == {GROUP}
    many = [i.to_bytes(6, "big") for i in range(TABLE_MAX + 1)]
    assert rig.ask(kind, code, table(many, [])) == OK
    assert rig.control.filter.has_all_unicast
    assert rig.control.filter.group == frozenset()


@pytest.mark.parametrize(
    "data", [b"", table([OTHER]), table([OTHER], [GROUP])[:-1], b"\xff\xff\xff\xff" * 2]
)
def test_tables_that_end_early(data: bytes) -> None:
    """An incomplete list is refused, and changes nothing."""
    rig = Rig()
    before = rig.control.filter
    assert rig.ask(abi.VIRTIO_NET_CTRL_MAC, abi.VIRTIO_NET_CTRL_MAC_TABLE_SET, data) == ERR
    assert rig.control.filter == before


def test_address() -> None:
    """The driver may choose another address, but no multicast one; a reset restores its own."""
    rig = Rig()
    kind, code = abi.VIRTIO_NET_CTRL_MAC, abi.VIRTIO_NET_CTRL_MAC_ADDR_SET
    assert rig.ask(kind, code, GROUP) == ERR
    assert rig.ask(kind, code, OTHER) == OK
    assert rig.control.config()[:6] == OTHER
    rig.control.reset()
    assert rig.control.config()[:6] == MAC


def test_a_locked_address() -> None:
    """A locked address, and with it the filter, stays unchanged, whatever the driver asks."""
    rig = Rig(is_locked=True)
    kind = abi.VIRTIO_NET_CTRL_MAC
    assert not rig.control.features >> abi.VIRTIO_NET_F_CTRL_MAC_ADDR & 1
    assert rig.ask(kind, abi.VIRTIO_NET_CTRL_MAC_ADDR_SET, OTHER) == ERR
    assert rig.ask(kind, abi.VIRTIO_NET_CTRL_MAC_TABLE_SET, table([OTHER], [])) == OK
    assert rig.ask(abi.VIRTIO_NET_CTRL_RX, abi.VIRTIO_NET_CTRL_RX_PROMISC, b"\1") == OK
    assert rig.port.wanted == rig.control.filter == locked_filter(MAC)


def test_vlans() -> None:
    """With negotiated VLANs the list starts empty, and VLANs can be added and removed."""
    rig = Rig()
    kind = abi.VIRTIO_NET_CTRL_VLAN
    assert rig.control.filter.vlans == frozenset()
    assert rig.ask(kind, abi.VIRTIO_NET_CTRL_VLAN_ADD, b"\5\0") == OK
    assert rig.control.filter.vlans == {5}
    assert rig.ask(kind, abi.VIRTIO_NET_CTRL_VLAN_ADD, b"\0\x10") == ERR
    assert rig.ask(kind, abi.VIRTIO_NET_CTRL_VLAN_DEL, b"\5\0") == OK
    assert rig.control.filter.vlans == frozenset()
    assert Rig(features=0).control.filter.vlans is None


def test_queue_pairs() -> None:
    """A driver may use one to all queue pairs."""
    rig = Rig()
    kind, code = abi.VIRTIO_NET_CTRL_MQ, abi.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET
    assert rig.ask(kind, code, b"\4\0") == OK
    assert rig.port.pairs == 4
    assert [rig.ask(kind, code, data) for data in (b"\0\0", b"\5\0", b"\1", b"")] == [ERR] * 4
    assert rig.port.pairs == 4


def test_offloads() -> None:
    """A driver may give up negotiated offloads, and take them back, but no others."""
    rig = Rig(features=0b11 << abi.VIRTIO_NET_F_GUEST_TSO4)
    kind, code = abi.VIRTIO_NET_CTRL_GUEST_OFFLOADS, abi.VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET
    assert rig.ask(kind, code, struct.pack("<Q", 1 << abi.VIRTIO_NET_F_GUEST_TSO4)) == OK
    assert rig.port.offloads == 1 << abi.VIRTIO_NET_F_GUEST_TSO4
    assert rig.ask(kind, code, struct.pack("<Q", 1 << abi.VIRTIO_NET_F_GUEST_UFO)) == ERR
    assert rig.ask(kind, code, b"\0") == ERR


def test_announcing() -> None:
    """The driver is asked to announce itself until it acknowledges."""
    rig = Rig()
    assert rig.control.announce()
    assert rig.control.config()[6] == abi.VIRTIO_NET_S_LINK_UP | abi.VIRTIO_NET_S_ANNOUNCE
    assert rig.ask(abi.VIRTIO_NET_CTRL_ANNOUNCE, abi.VIRTIO_NET_CTRL_ANNOUNCE_ACK) == OK
    assert rig.control.config()[6] == abi.VIRTIO_NET_S_LINK_UP


def test_a_driver_that_cannot_announce_itself() -> None:
    """A driver that has not negotiated announcing is not asked to."""
    rig = Rig(features=1 << abi.VIRTIO_NET_F_CTRL_VQ)
    assert not rig.control.announce()
    assert rig.control.config()[6] == abi.VIRTIO_NET_S_LINK_UP


def test_an_interface_that_is_gone() -> None:
    """If the host refuses a setting, so does the device."""
    rig = Rig()
    rig.port.is_gone = True
    assert rig.ask(abi.VIRTIO_NET_CTRL_RX, abi.VIRTIO_NET_CTRL_RX_PROMISC, b"\0") == ERR


def test_where_commands_come_in() -> None:
    """The control queue follows all pairs, or the first one if only one is negotiated."""
    control, commands = Rig().control, 1 << abi.VIRTIO_NET_F_CTRL_VQ
    assert control.control_queue(0) is None
    assert control.control_queue(commands) == 2
    assert control.control_queue(commands | 1 << abi.VIRTIO_NET_F_MQ) == 8


@pytest.mark.parametrize(
    "buffers",
    [
        ((COMMAND, 1, False), (ANSWER, 1, True)),
        ((ANSWER, 1, True),),
        ((COMMAND, 2, False),),
    ],
)
def test_what_is_no_command(buffers: tuple[tuple[int, int, bool], ...]) -> None:
    """A command without its code, or without room for an answer, stops the device."""
    rig = Rig()
    rig.queue.add(*buffers)
    with pytest.raises(VirtqueueError):
        rig.control.process(rig.side)


@given(
    commands=st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 6), st.binary(max_size=40)), max_size=20
    )
)
def test_no_command_does_harm(commands: list[tuple[int, int, bytes]]) -> None:
    """Any command is answered, and a locked interface stays locked."""
    rig = Rig(is_locked=True)
    for kind, code, data in commands:
        assert rig.ask(kind, code, data) in {OK, ERR}
    assert rig.port.wanted == locked_filter(MAC)
    assert 1 <= rig.port.pairs <= 4
