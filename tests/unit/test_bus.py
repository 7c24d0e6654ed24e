"""Buses: the device at an address, and accesses without one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import RecordingDevice
from vmm_kvm.bits import all_ones
from vmm_kvm.bus import Bus
from vmm_kvm.errors import BusError

SIZES = (1, 2, 4, 8)


def test_access_reaches_the_device_at_its_offset() -> None:
    """A device sees offsets from its base, sizes, and the guest's values."""
    bus = Bus(0x10000)
    device = RecordingDevice(value=0x12345678)
    bus.insert(0x3F8, 8, device)
    bus.write(0x3FA, 2, 0xABCD)
    assert bus.read(0x3FC, 4) == 0x12345678
    assert device.writes == [(2, 2, 0xABCD)]
    assert device.reads == [(4, 4)]


def test_lock_is_held_and_released() -> None:
    """The bus takes the device's lock for an access and gives it back."""
    bus = Bus(16)
    device = RecordingDevice()  # asserts that its lock is held
    bus.insert(0, 16, device)
    bus.write(0, 1, 0)
    bus.read(0, 1)
    assert not device.lock.locked()


@pytest.mark.parametrize("size", SIZES)
def test_unclaimed_reads_are_all_ones(size: int) -> None:
    """Unclaimed reads are all ones of their size, and writes vanish."""
    bus = Bus(0x100)
    bus.write(0x10, size, 0)
    assert all_ones(size) == bus.read(0x10, size)


def test_straddling_access_is_nobodys() -> None:
    """An access that leaves its range reads as all ones and reaches no device."""
    bus = Bus(0x100)
    first, second = RecordingDevice(), RecordingDevice()
    bus.insert(0x10, 4, first)
    bus.insert(0x14, 4, second)
    bus.write(0x12, 4, 0)
    assert bus.read(0x13, 2) == 0xFFFF
    assert (first.reads, first.writes, second.reads, second.writes) == ([], [], [], [])


@pytest.mark.parametrize(("base", "size"), [(-1, 4), (0xFF, 2), (0x10, 0), (0x10, -1), (0x100, 1)])
def test_ranges_outside_the_bus_are_refused(base: int, size: int) -> None:
    """An empty range, or one that leaves the bus, cannot be inserted."""
    with pytest.raises(BusError, match="outside a bus"):
        Bus(0x100).insert(base, size, RecordingDevice())


@pytest.mark.parametrize(("base", "size"), [(0x10, 8), (0x0C, 5), (0x17, 1), (0x12, 2), (0, 0x100)])
def test_overlaps_are_refused(base: int, size: int) -> None:
    """A range that shares an address with another cannot be inserted, and changes nothing."""
    bus = Bus(0x100)
    device, other = RecordingDevice(), RecordingDevice()
    bus.insert(0x10, 8, device)
    with pytest.raises(BusError, match="overlaps"):
        bus.insert(base, size, other)
    bus.write(0x10, 1, 7)
    assert device.writes == [(0, 1, 7)]
    assert other.writes == []


def test_neighbours_do_not_overlap() -> None:
    """Ranges may touch."""
    bus = Bus(0x100)
    devices = [RecordingDevice(value) for value in range(3)]
    for base, device in zip((0x14, 0x10, 0x18), devices, strict=True):
        bus.insert(base, 4, device)
    assert [bus.read(address, 1) for address in (0x10, 0x14, 0x18)] == [1, 0, 2]


def test_removal_takes_effect_at_once() -> None:
    """After its removal a device is not reached, even at addresses that were looked up before."""
    bus = Bus(0x100)
    device = RecordingDevice(0)
    bus.insert(0x10, 4, device)
    assert bus.read(0x11, 1) == 0
    bus.remove(0x10)
    assert bus.read(0x11, 1) == 0xFF


def test_insertion_takes_effect_at_once() -> None:
    """A device answers as soon as it is inserted, even at an address without one before."""
    bus = Bus(0x100)
    assert bus.read(0x11, 1) == 0xFF
    bus.insert(0x10, 4, RecordingDevice(0))
    assert bus.read(0x11, 1) == 0


def test_a_watched_table_is_emptied_by_every_change() -> None:
    """A vCPU's look-ups are forgotten when a range comes or goes, and kept afterwards."""
    bus = Bus(0x100)
    table = {1: "learnt"}
    with bus.watched(table):
        bus.insert(0x10, 4, RecordingDevice())
        assert table == {}
        table[2] = "learnt"
        bus.remove(0x10)
        assert table == {}
    table[3] = "learnt"
    bus.insert(0x10, 4, RecordingDevice())
    assert table == {3: "learnt"}


@pytest.mark.parametrize("base", [0x0F, 0x11, 0x20])
def test_removing_what_is_not_there(base: int) -> None:
    """A range can be removed only by its base."""
    bus = Bus(0x100)
    bus.insert(0x10, 4, RecordingDevice())
    with pytest.raises(BusError, match="not on this bus"):
        bus.remove(base)


def test_memory_of_lookups_is_bounded() -> None:
    """The host remembers a bounded number of addresses that a guest touches."""
    bus = Bus(1 << 20)
    bus.insert(0, 1 << 19, RecordingDevice())
    for address in range(20_000):
        bus.read(address, 1)
    assert len(bus._claims) <= 4096


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 63), st.integers(1, 16)), min_size=1, max_size=40
    )
)
def test_bus_agrees_with_a_plain_map(changes: list[tuple[bool, int, int]]) -> None:
    """After any insertions and removals, each address belongs to the range of a plain table."""
    bus = Bus(64)
    owners: dict[int, int] = {}
    bases: dict[int, int] = {}
    for number, (inserts, base, size) in enumerate(changes):
        wanted = range(base, base + size)
        if inserts:
            if base + size <= 64 and not any(address in owners for address in wanted):
                bus.insert(base, size, RecordingDevice(number))
                bases[base] = size
                owners.update(dict.fromkeys(wanted, number))
            else:
                with pytest.raises(BusError):
                    bus.insert(base, size, RecordingDevice(number))
        elif base in bases:
            bus.remove(base)
            for address in range(base, base + bases.pop(base)):
                del owners[address]
        else:
            with pytest.raises(BusError):
                bus.remove(base)
        assert [owners.get(address, 0xFF) for address in range(64)] == [
            bus.read(address, 1) for address in range(64)
        ]
