"""The chipset that UEFI firmware expects: IDs, and the places of ECAM and power management."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import RecordingDevice
from vmm_kvm.arch.x86 import layout
from vmm_kvm.bits import MIB
from vmm_kvm.bus import Bus
from vmm_kvm.errors import SpecError
from vmm_kvm.pci.config import BarKind, PciFunction
from vmm_kvm.pci.host import EcamWindow, PciHost
from vmm_kvm.pci.ids import CapabilityId, Command, Register
from vmm_kvm.pci.q35 import LPC_SLOT, MovableWindow, host_bridge, isa_bridge

ADDRESS, DATA = layout.PORT_PCI_CONFIG, layout.PORT_PCI_CONFIG + 4
PCIEXBAR = 0x60
MCH_ID, LPC_ID = 0x29C0_8086, 0x2918_8086
NOBODY = 0xFFFF_FFFF


class Rig:
    """A machine's buses with a Q35 host."""

    def __init__(self) -> None:
        self.pio, self.mmio = Bus(0x10000), Bus(1 << 40)
        window = MovableWindow(self.mmio, layout.ECAM_SIZE)
        self.host = PciHost(
            self.pio,
            self.mmio,
            on_reset=lambda: None,
            bridge=host_bridge(window.move),
            hole_start=layout.UEFI_HOLE_START,
        )
        window.device = EcamWindow(self.host)
        self.host.add(isa_bridge(), LPC_SLOT)
        self.pio.insert(layout.PORT_PCI_CONFIG, 8, self.host)

    def read(self, slot: int, register: int, size: int = 4) -> int:
        """Read configuration space through the ports."""
        self.pio.write(ADDRESS, 4, 1 << 31 | slot << 11 | register & 0xFC)
        return self.pio.read(DATA + (register & 3), size)

    def write(self, slot: int, register: int, value: int, size: int = 4) -> None:
        """Write configuration space through the ports."""
        self.pio.write(ADDRESS, 4, 1 << 31 | slot << 11 | register & 0xFC)
        self.pio.write(DATA + (register & 3), size, value)

    def set_ecam(self, base: int) -> None:
        """Write PCIEXBAR as OVMF does: off, the high half, the low half with the enable bit."""
        self.write(0, PCIEXBAR, 0)
        self.write(0, PCIEXBAR + 4, base >> 32)
        self.write(0, PCIEXBAR, base & 0xFFFF_FFFF | 1)


@pytest.fixture
def rig() -> Rig:
    """A host whose ECAM is nowhere yet."""
    return Rig()


def test_the_bridges_are_intels(rig: Rig) -> None:
    """The host bridge is in slot 0, the ISA bridge in slot 31, with its class."""
    assert rig.read(0, Register.VENDOR_ID) == MCH_ID
    assert rig.read(LPC_SLOT, Register.VENDOR_ID) == LPC_ID
    assert rig.read(LPC_SLOT, Register.REVISION_ID) >> 8 == 0x06_01_00


def test_power_management_is_where_the_layout_has_it(rig: Rig) -> None:
    """PMBASE is fixed and enabled; there are no GPIOs and no root complex registers."""
    rig.write(LPC_SLOT, 0x40, 0x1234_5678)
    assert rig.read(LPC_SLOT, 0x40) == layout.PORT_PM1A_EVENT | 1
    assert rig.read(LPC_SLOT, 0x44, 1) == 0x80
    rig.write(LPC_SLOT, 0xF0, 0xFED1_C001)
    assert rig.read(LPC_SLOT, 0xF0) == 0


@pytest.mark.parametrize("base", [0xB000_0000, 0xE000_0000, 0x8_0000_0000], ids=hex)
def test_ecam_goes_where_the_guest_wants_it(rig: Rig, base: int) -> None:
    """At the ECAM address of each version of OVMF both bridges are found."""
    assert rig.mmio.read(base, 4) == NOBODY
    rig.set_ecam(base)
    assert rig.mmio.read(base, 4) == MCH_ID
    assert rig.mmio.read(base + (LPC_SLOT << 15), 4) == LPC_ID
    assert rig.mmio.read(base + MIB, 4) == NOBODY  # bus 1


def test_ecam_moves_and_goes(rig: Rig) -> None:
    """There is one window; without the enable bit, or after a reset, there is none."""
    rig.set_ecam(0xB000_0000)
    rig.set_ecam(0xE000_0000)
    assert rig.mmio.read(0xB000_0000, 4) == NOBODY
    assert rig.mmio.read(0xE000_0000, 4) == MCH_ID
    rig.host.reset()
    assert rig.mmio.read(0xE000_0000, 4) == NOBODY


def test_a_snapshot_brings_ecam_back(rig: Rig) -> None:
    """A restore brings the ECAM window back to its address."""
    rig.set_ecam(0xB000_0000)
    other = Rig()
    other.host.restore(rig.host.save())
    assert other.mmio.read(0xB000_0000, 4) == MCH_ID


def test_ecam_where_something_else_is(rig: Rig) -> None:
    """Over another device ECAM is not mapped, and the device stays."""
    rig.mmio.insert(0xB000_0000, 4, RecordingDevice(value=7))
    rig.set_ecam(0xB000_0000)
    assert rig.mmio.read(0xB000_0000, 4) == 7
    rig.set_ecam(0xE000_0000)
    assert rig.mmio.read(0xE000_0000, 4) == MCH_ID


def test_bars_lie_above_2_gib(rig: Rig) -> None:
    """OVMF places BARs from 2 GiB up; with the usual hole they would not be decoded."""
    function = PciFunction(vendor_id=1, device_id=2, class_code=0)
    function.add_bar(0, BarKind.MEMORY32, 4096, RecordingDevice(value=0x55))
    slot = rig.host.add(function)
    assert slot == 1
    rig.write(slot, Register.BAR0, 0x8000_0000)
    rig.write(slot, Register.COMMAND, Command.MEMORY_SPACE, 2)
    assert rig.mmio.read(0x8000_0000, 1) == 0x55


def test_a_slot_is_taken_once(rig: Rig) -> None:
    """A second function for the same slot is refused, and the bus has 31 for others."""
    with pytest.raises(SpecError, match="slot 31 is taken"):
        rig.host.add(isa_bridge(), LPC_SLOT)
    for _ in range(30):
        rig.host.add(PciFunction(vendor_id=1, device_id=2, class_code=0))
    with pytest.raises(SpecError, match="more than 31"):
        rig.host.add(PciFunction(vendor_id=1, device_id=2, class_code=0))


def test_registers_and_capabilities_do_not_meet() -> None:
    """Capabilities follow registers, and are linked from the header; an overlap is refused."""
    function = PciFunction(vendor_id=1, device_id=2, class_code=0)
    function.add_registers(0x50, b"\x01\x02\x03", writable=b"\x00\xff")
    first = function.add_capability(CapabilityId.VENDOR_SPECIFIC, b"abc")
    second = function.add_capability(CapabilityId.VENDOR_SPECIFIC, b"d")
    assert function.read_config(Register.CAPABILITIES, 1) == first == 0x54
    assert function.read_config(first + 1, 1) == second
    assert function.read_config(second + 1, 1) == 0
    function.write_config(0x50, 4, 0xFFFF_FFFF)
    assert function.read_config(0x50, 4) == 0x0003_FF01
    for offset in (0x3C, 0x52, 0xFF):
        with pytest.raises(SpecError, match="the place is taken"):
            function.add_registers(offset, b"\0\0")


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 255)), max_size=30))
def test_any_writes_leave_one_window_or_none(writes: list[tuple[int, int]]) -> None:
    """After any writes, the register's low half gives the window's address."""
    rig = Rig()
    for at, value in writes:
        rig.write(0, PCIEXBAR + at, value, 1)
    low, high = rig.read(0, PCIEXBAR), rig.read(0, PCIEXBAR + 4)
    base = (high << 32 | low) & 0xF_F000_0000
    expected = MCH_ID if low & 1 else NOBODY
    assert rig.mmio.read(base, 4) == expected
