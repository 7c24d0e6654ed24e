"""An interface whose frames another process moves: the calls to each part."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.virtio_driver import DriverQueue, PlainMemory
from vmm_kvm.errors import HaltError, SpecError, VirtqueueError
from vmm_kvm.net.ethernet import Filter
from vmm_kvm.net.vhost import VhostNet
from vmm_kvm.state import Part
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.device import Frontend
from vmm_kvm.virtio.net_control import NetControl
from vmm_kvm.virtio.net_split import SplitNet
from vmm_kvm.virtio.queue import Ring
from vmm_kvm.write_log import SharedLog

MAC = bytes.fromhex("fee1bb000001")
PAIRS = 2
COMMANDS, MQ = 1 << abi.VIRTIO_NET_F_CTRL_VQ, 1 << abi.VIRTIO_NET_F_MQ
COMMAND, ANSWER = 0x10000, 0x10100
WAIT_S = 10.0


class DataQueues:
    """A dataplane that records its calls."""

    device_id = abi.VIRTIO_ID_NET
    features = 1 << abi.VIRTIO_NET_F_CSUM | 1 << abi.VIRTIO_RING_F_EVENT_IDX
    queue_sizes: tuple[int, ...] = (1024,) * (2 * PAIRS)

    def __init__(self) -> None:
        self.served: set[int] = set()
        self.kicked: list[int] = []
        self.is_refusing = False
        self.is_closed = False
        self.is_suspended = False

    def attach(self, frontend: Frontend) -> None:
        """Ignore it."""

    def config(self) -> bytes:
        """Have none."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore it."""

    def start(self, _features: int, rings: Mapping[int, Ring]) -> None:
        """Note it, or refuse."""
        if self.is_refusing:
            raise VirtqueueError("no")
        self.served = set(rings)

    def start_queue(self, index: int, _ring: Ring) -> None:
        """Note it."""
        self.served.add(index)

    def stop_queue(self, index: int) -> None:
        """Note it."""
        self.served.discard(index)

    def stop(self) -> None:
        """Note it."""
        self.served.clear()

    def settle(self) -> None:
        """Ignore it."""

    def suspend(self) -> None:
        """Note it."""
        self.is_suspended = True

    def resume(self) -> None:
        """Note it."""
        self.is_suspended = False

    def positions(self) -> Mapping[int, int]:
        """Return some for the queues that are served."""
        return {index: 100 + index for index in self.served}

    def restore(
        self, features: int, rings: Mapping[int, Ring], positions: Mapping[int, int]
    ) -> None:
        """Note it."""
        self.start(features, rings)
        assert positions.keys() >= rings.keys()
        self.is_suspended = True

    def log_writes(self, _log: SharedLog | None) -> bool:
        """Have nothing to mark."""
        return True

    def parts(self, _name: str) -> list[Part]:
        """Have none."""
        return []

    def kick(self, index: int) -> None:
        """Note it."""
        self.kicked.append(index)

    def kick_fd(self, index: int) -> int:
        """Return a number that identifies the queue."""
        return -100 - index

    def close(self) -> None:
        """Note it."""
        self.stop()
        self.is_closed = True


class Port:
    """A port that remembers the number of used pairs."""

    pairs = 0

    def set_guest_offloads(self, features: int) -> None:
        """Ignore it."""

    def set_pairs(self, count: int) -> None:
        """Remember it."""
        self.pairs = count

    def set_filter(self, wanted: Filter) -> None:
        """Ignore it."""


class Calls:
    """A Frontend that writes an eventfd."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.changes = 0

    def interrupt(self, _index: int) -> None:
        """Write to the test's eventfd."""
        os.eventfd_write(self.fd, 1)

    def interrupt_fd(self, _index: int) -> int | None:
        """Return none: the device then calls `interrupt`."""
        return None

    def config_changed(self) -> None:
        """Count it."""
        self.changes += 1

    def fail(self, reason: str) -> None:
        """Fail: it must never be called."""
        raise AssertionError(reason)

    def halt(self, err: HaltError) -> None:
        """Fail: it must never be called."""
        raise err


class Rig:
    """A device with the queue of its commands."""

    def __init__(self) -> None:
        self.data, self.port, self.calls = DataQueues(), Port(), Calls()
        self.memory = PlainMemory()
        control = NetControl(MAC, self.port, name="nic0", pairs=PAIRS)
        self.device = SplitNet(self.data, control, self.memory, "nic0")
        self.device.attach(self.calls)
        self.queue = DriverQueue(self.memory)

    def close(self) -> None:
        """Close the device."""
        self.device.close()
        os.close(self.calls.fd)

    def command(self, index: int, *data: int) -> int:
        """Give a command on queue `index`; returns the answer."""
        self.memory.bytes[COMMAND : COMMAND + len(data)] = bytes(data)
        self.queue.add((COMMAND, len(data), False), (ANSWER, 1, True))
        self.device.kick(index)
        assert select.select([self.calls.fd], [], [], WAIT_S)[0], "no answer"
        os.eventfd_read(self.calls.fd)
        return self.memory.bytes[ANSWER]


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Return a device that is closed afterwards."""
    made = Rig()
    yield made
    made.close()
    assert made.data.is_closed


def test_what_it_is(rig: Rig) -> None:
    """The device offers the features of either part, but no queue feature that one lacks."""
    offered = {number for number in range(64) if rig.device.features >> number & 1}
    assert {abi.VIRTIO_NET_F_CSUM, abi.VIRTIO_NET_F_MQ, abi.VIRTIO_NET_F_CTRL_VQ} <= offered
    assert abi.VIRTIO_RING_F_EVENT_IDX in offered
    assert abi.VIRTIO_RING_F_INDIRECT_DESC not in offered
    assert rig.device.queue_sizes == (1024,) * 4 + (64,)
    assert rig.device.config()[:6] == MAC


@pytest.mark.parametrize(("features", "index"), [(COMMANDS | MQ, 4), (COMMANDS, 2)])
def test_commands_are_obeyed_here(rig: Rig, features: int, index: int) -> None:
    """The control queue follows all pairs, or the first; the other queues are the dataplane's."""
    rings = dict.fromkeys((0, 1, index), rig.queue.ring)
    rig.device.start(features, rings)
    assert rig.data.served == {0, 1}
    pairs = (abi.VIRTIO_NET_CTRL_MQ, abi.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, PAIRS, 0)
    assert rig.command(index, *pairs) == abi.VIRTIO_NET_OK
    assert rig.port.pairs == PAIRS
    rig.device.kick(1)
    assert (rig.data.kicked, rig.device.kick_fd(1)) == ([1], -101)
    assert rig.device.kick_fd(index) >= 0
    rig.device.stop_queue(1)
    rig.device.start_queue(0, rig.queue.ring)
    rig.device.stop_queue(index)
    assert rig.data.served == {0}


def test_a_start_that_fails(rig: Rig) -> None:
    """After a failed start neither part serves anything."""
    rig.data.is_refusing = True
    with pytest.raises(VirtqueueError):
        rig.device.start(COMMANDS | MQ, {4: rig.queue.ring})
    rig.data.is_refusing = False
    rig.device.start(COMMANDS | MQ, {4: rig.queue.ring})
    assert rig.command(4, 9, 9) == abi.VIRTIO_NET_ERR


def test_the_link(rig: Rig) -> None:
    """An unplugged link shows in the configuration space, and the driver is notified."""
    rig.device.set_link(False)
    assert (rig.device.config()[6], rig.calls.changes) == (0, 1)


def test_announcing(rig: Rig) -> None:
    """A driver that can announce itself is asked to; another is not."""
    for features, told in ((COMMANDS, 0), (COMMANDS | 1 << abi.VIRTIO_NET_F_GUEST_ANNOUNCE, 1)):
        rig.device.start(features, {2: rig.queue.ring})
        assert rig.command(2, 9, 9) == abi.VIRTIO_NET_ERR  # the device has started
        rig.device.announce()
        assert (rig.device.config()[6] >> 1 & 1, rig.calls.changes) == (told, told)
        rig.device.stop()


def test_what_is_no_vhost_net() -> None:
    """Another descriptor is refused with one line."""
    with Path("/dev/null").open("rb") as file, pytest.raises(SpecError, match="not of /dev/vhost"):
        VhostNet(file.fileno())


def test_a_successor_goes_on(rig: Rig) -> None:
    """A state has both parts' positions; the new device has the driver's settings, and works on."""
    features, rings = COMMANDS | MQ, dict.fromkeys((0, 1, 4), rig.queue.ring)
    rig.device.start(features, rings)
    pairs = (abi.VIRTIO_NET_CTRL_MQ, abi.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, PAIRS, 0)
    assert rig.command(4, *pairs) == abi.VIRTIO_NET_OK
    rig.device.suspend()
    assert rig.data.is_suspended
    positions = rig.device.positions()
    assert positions == {0: 100, 1: 101, 4: 1}
    (part,) = rig.device.parts("net")
    other = Rig()
    try:
        other.memory, other.queue = rig.memory, rig.queue
        other.device.close()
        other.data = DataQueues()
        control = NetControl(MAC, other.port, name="nic0", pairs=PAIRS)
        other.device = SplitNet(other.data, control, rig.memory, "nic0")
        other.device.attach(other.calls)
        other.device.restore(features, rings, positions)
        (successor,) = other.device.parts("net")
        successor.restore(*part.save())
        assert (part.name, other.port.pairs) == (successor.name, PAIRS)
        other.device.resume()
        assert not other.data.is_suspended
        assert other.command(4, 9, 9) == abi.VIRTIO_NET_ERR
    finally:
        other.close()
