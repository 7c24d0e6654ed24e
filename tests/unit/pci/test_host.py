"""The host bridge: both configuration mechanisms, and BARs that come, move and go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import Operation, RecordingDevice, RecordingIrqLine, exercise
from vmm_kvm.arch.x86 import layout
from vmm_kvm.bits import GIB, KIB, MIB, all_ones
from vmm_kvm.bus import Bus
from vmm_kvm.errors import SpecError, StateError
from vmm_kvm.pci.config import BarKind, PciFunction
from vmm_kvm.pci.host import EcamWindow, PciHost
from vmm_kvm.pci.ids import Command, Register

ADDRESS = layout.PORT_PCI_CONFIG
DATA = layout.PORT_PCI_CONFIG + 4
IO_BASE = 0xC000
MEMORY_BASE = 0xC800_0000
MMIO_SIZE = 1 << 40


class Rig:
    """A machine's buses with a PCI host; every access goes through them, like a guest's."""

    def __init__(self) -> None:
        self.pio = Bus(0x10000)
        self.mmio = Bus(MMIO_SIZE)
        self.resets = 0
        self.host = PciHost(self.pio, self.mmio, on_reset=self._reset)
        self.pio.insert(layout.PORT_PCI_CONFIG, 8, self.host)
        self.mmio.insert(layout.ECAM_START, layout.ECAM_SIZE, EcamWindow(self.host))

    def _reset(self) -> None:
        self.resets += 1

    def add(self, *bars: tuple[BarKind, int]) -> tuple[int, list[RecordingDevice]]:
        """Add a function with BARs; returns its slot and the devices behind them."""
        function = PciFunction(
            vendor_id=0x1AF4,
            device_id=0x1041,
            class_code=0x02_00_00,
            interrupt_pin=1,
            intx=RecordingIrqLine(),
        )
        devices = []
        index = 0
        for kind, size in bars:
            device = RecordingDevice(value=0x1234_5678)
            devices.append(device)
            function.add_bar(index, kind, size, device)
            index += 2 if kind is BarKind.MEMORY64 else 1
        return self.host.add(function), devices

    def read(self, slot: int, register: int, size: int = 4) -> int:
        """Read configuration space through the ports."""
        self.pio.write(ADDRESS, 4, 1 << 31 | slot << 11 | register & 0xFC)
        return self.pio.read(DATA + (register & 3), size)

    def write(self, slot: int, register: int, value: int, size: int = 4) -> None:
        """Write configuration space through the ports."""
        self.pio.write(ADDRESS, 4, 1 << 31 | slot << 11 | register & 0xFC)
        self.pio.write(DATA + (register & 3), size, value)


@pytest.fixture
def rig() -> Rig:
    """A machine with nothing on its bus but the host bridge."""
    return Rig()


# Configuration mechanism 1


def test_host_bridge(rig: Rig) -> None:
    """OpenBSD's host bridge is at 00:00.0."""
    assert rig.read(0, Register.VENDOR_ID) == 0x0666_0B5D
    assert rig.read(0, Register.CLASS_CODE, 1) == 0
    assert rig.read(0, Register.REVISION_ID) >> 16 == 0x0600
    assert rig.read(0, Register.SUBSYSTEM_VENDOR_ID) == 0x0B5D


@pytest.mark.parametrize(
    "address",
    [
        0x0000_0000,  # not enabled
        0x8000_0800,  # an empty slot
        0x8000_0100,  # function 1 of the host bridge
        0x8001_0000,  # bus 1
        0x80FF_FFFC,
    ],
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_absent_functions_are_ones(rig: Rig, address: int, size: int) -> None:
    """Without a function, and while the mechanism is disabled, everything reads as ones."""
    rig.pio.write(ADDRESS, 4, address)
    rig.pio.write(DATA, size, 0)
    assert all_ones(size) == rig.pio.read(DATA, size)


def test_data_port_sizes(rig: Rig) -> None:
    """Bytes and words of the selected dword are at their offsets in the data port."""
    assert [rig.read(0, at, 1) for at in range(4)] == [0x5D, 0x0B, 0x66, 0x06]
    assert [rig.read(0, at, 2) for at in range(3)] == [0x0B5D, 0x660B, 0x0666]
    rig.write(0, Register.LATENCY_TIMER, 0x40, 1)
    assert rig.read(0, Register.CACHE_LINE_SIZE) == 0x4000


def test_linux_finds_mechanism_1(rig: Rig) -> None:
    """The address register keeps its dword, and its bytes are not the older mechanism's.

    Source: Linux arch/x86/pci/direct.c, pci_check_type1 and pci_check_type2
    """
    rig.pio.write(ADDRESS + 3, 1, 0x01)
    rig.pio.write(ADDRESS, 4, 0x8000_0000)
    assert rig.pio.read(ADDRESS, 4) == 0x8000_0000
    for port in (ADDRESS + 3, ADDRESS, ADDRESS + 2):
        rig.pio.write(port, 1, 0)
    assert (rig.pio.read(ADDRESS, 1), rig.pio.read(ADDRESS + 2, 1)) == (0xFF, 0xFF)
    assert rig.pio.read(ADDRESS, 4) == 0x8000_0000


def test_address_register_bits(rig: Rig) -> None:
    """Reserved bits of the address read as zero."""
    rig.pio.write(ADDRESS, 4, 0xFFFF_FFFF)
    assert rig.pio.read(ADDRESS, 4) == 0x80FF_FFFC


def test_accesses_across_both_registers(rig: Rig) -> None:
    """An access that spans address and data reaches neither."""
    rig.pio.write(ADDRESS, 4, 0x8000_0000)
    rig.pio.write(ADDRESS + 2, 4, 0)
    assert rig.pio.read(ADDRESS + 2, 4) == 0xFFFF_FFFF
    assert rig.pio.read(ADDRESS, 4) == 0x8000_0000


# Reset control


@pytest.mark.parametrize(
    ("values", "resets"),
    [
        ((0x06,), 1),
        ((0x02, 0x06), 1),
        ((0x04,), 1),
        ((0x0E,), 1),
        ((0x02,), 0),
        ((0x06, 0x06), 1),
        ((0x06, 0x02, 0x06), 2),
        ((0xF1,), 0),
    ],
)
def test_reset_control(rig: Rig, values: tuple[int, ...], resets: int) -> None:
    """The machine resets when bit 2 rises; the other bits choose the kind."""
    for value in values:
        rig.pio.write(layout.PORT_RESET, 1, value)
    assert resets == rig.resets
    assert values[-1] & 0x0E == rig.pio.read(layout.PORT_RESET, 1)


def test_address_writes_do_not_reset(rig: Rig) -> None:
    """A dword write of the address does not write the reset register inside it."""
    rig.pio.write(ADDRESS, 4, 0xFFFF_FFFF)
    rig.pio.write(ADDRESS + 1, 2, 0x0606)
    assert rig.resets == 0


# ECAM


def test_ecam_is_the_same_space(rig: Rig) -> None:
    """Writes by one mechanism are read by the other."""
    slot, _ = rig.add()
    ecam = layout.ECAM_START + (slot << 15)
    assert rig.mmio.read(ecam, 4) == 0x1041_1AF4
    rig.mmio.write(ecam + Register.INTERRUPT_LINE, 1, 0x55)
    assert rig.read(slot, Register.INTERRUPT_LINE, 1) == 0x55
    assert rig.mmio.read(ecam + Register.VENDOR_ID, 8) == rig.read(slot, 4) << 32 | 0x1041_1AF4


@pytest.mark.parametrize(
    "offset",
    [
        0x100,  # extended configuration space of the host bridge
        0xFFF,
        0x1000,  # function 1
        0x8000,  # an empty slot
        0xF_FFF8,
    ],
)
def test_ecam_elsewhere_is_ones(rig: Rig, offset: int) -> None:
    """Outside functions' registers ECAM reads as ones and drops writes."""
    rig.mmio.write(layout.ECAM_START + offset, 1, 0)
    assert rig.mmio.read(layout.ECAM_START + offset, 1) == 0xFF


# Slots


def test_slots_are_given_in_order(rig: Rig) -> None:
    """Functions take slots 1 to 31 in the order of their addition."""
    assert rig.host.next_slot == 1
    assert [rig.add()[0] for _ in range(31)] == list(range(1, 32))
    assert rig.host.next_slot == 32
    with pytest.raises(SpecError):
        rig.add()


def test_interrupt_lines_rotate(rig: Rig) -> None:
    """Each slot knows the PIC input of its pin; without a pin there is none."""
    slots = [rig.add()[0] for _ in range(4)]
    inta, intb, intc, intd = layout.PIC_PCI_INTX
    lines = [rig.read(slot, Register.INTERRUPT_LINE, 1) for slot in slots]
    assert lines == [intb, intc, intd, inta]
    assert rig.read(0, Register.INTERRUPT_LINE, 1) == 0


# BARs


def test_bars_appear_when_they_are_enabled(rig: Rig) -> None:
    """A BAR answers at its address while the command bit is set."""
    slot, (ports, memory) = rig.add((BarKind.IO, 32), (BarKind.MEMORY32, 4 * KIB))
    rig.write(slot, Register.BAR0, IO_BASE)
    rig.write(slot, Register.BAR0 + 4, MEMORY_BASE)
    assert rig.pio.read(IO_BASE, 4) == rig.mmio.read(MEMORY_BASE, 4) == 0xFFFF_FFFF
    rig.write(slot, Register.COMMAND, Command.IO_SPACE, 2)
    assert rig.pio.read(IO_BASE + 4, 4) == 0x1234_5678
    assert rig.mmio.read(MEMORY_BASE, 4) == 0xFFFF_FFFF
    rig.write(slot, Register.COMMAND, Command.IO_SPACE | Command.MEMORY_SPACE, 2)
    rig.mmio.write(MEMORY_BASE + 0xFF8, 8, 7)
    rig.write(slot, Register.COMMAND, 0, 2)
    assert rig.pio.read(IO_BASE, 4) == rig.mmio.read(MEMORY_BASE, 4) == 0xFFFF_FFFF
    assert ports.reads == [(4, 4)]
    assert memory.writes == [(0xFF8, 8, 7)]


def test_bars_move(rig: Rig) -> None:
    """Rewriting a decoded BAR moves it, through ECAM too."""
    slot, _ = rig.add((BarKind.MEMORY32, 4 * KIB))
    rig.write(slot, Register.BAR0, MEMORY_BASE)
    rig.write(slot, Register.COMMAND, Command.MEMORY_SPACE, 2)
    rig.mmio.write(layout.ECAM_START + (slot << 15) + Register.BAR0, 4, MEMORY_BASE + MIB)
    assert rig.mmio.read(MEMORY_BASE, 4) == 0xFFFF_FFFF
    assert rig.mmio.read(MEMORY_BASE + MIB, 4) == 0x1234_5678


def test_who_answers_learns_where(rig: Rig) -> None:
    """A BAR's listener learns each address at which the BAR is decoded, and its end."""
    heard: list[int | None] = []
    function = PciFunction(vendor_id=1, device_id=2, class_code=0)
    device = RecordingDevice()
    function.add_bar(0, BarKind.MEMORY32, 0x1000, device, on_decode=heard.append)
    slot = rig.host.add(function)
    rig.write(slot, Register.BAR0, 0xC000_0000)
    rig.write(slot, Register.COMMAND, Command.MEMORY_SPACE, 2)
    rig.write(slot, Register.BAR0, 0xC000_2000)
    rig.write(slot, Register.COMMAND, 0, 2)
    assert heard == [0xC000_0000, None, 0xC000_2000, None]


def test_sizing_while_decoded(rig: Rig) -> None:
    """A guest may size a BAR without disabling it first; the BAR returns to its address."""
    slot, _ = rig.add((BarKind.MEMORY32, 4 * KIB), (BarKind.IO, 16))
    rig.write(slot, Register.BAR0, MEMORY_BASE)
    rig.write(slot, Register.BAR0 + 4, IO_BASE)
    rig.write(slot, Register.COMMAND, Command.MEMORY_SPACE | Command.IO_SPACE, 2)
    for register, size_mask, base in (
        (Register.BAR0, 0xFFFF_F000, MEMORY_BASE),
        (Register.BAR0 + 4, 0xFFFF_FFF1, IO_BASE),
    ):
        rig.write(slot, register, 0xFFFF_FFFF)
        assert size_mask == rig.read(slot, register)
        rig.write(slot, register, base)
    assert rig.mmio.read(MEMORY_BASE, 4) == rig.pio.read(IO_BASE, 4) == 0x1234_5678


def test_sixty_four_bit_bars(rig: Rig) -> None:
    """A 64-bit BAR is decoded above 4 GiB too, as far as the bus reaches."""
    slot, _ = rig.add((BarKind.MEMORY64, 16 * KIB))
    rig.write(slot, Register.BAR0, 0)
    rig.write(slot, Register.BAR0 + 4, 0x20)
    rig.write(slot, Register.COMMAND, Command.MEMORY_SPACE, 2)
    assert rig.mmio.read(0x20_0000_0000, 4) == 0x1234_5678
    rig.write(slot, Register.BAR0 + 4, 0xFFFF_FFFF)
    assert rig.mmio.read(0x20_0000_0000, 4) == 0xFFFF_FFFF


@pytest.mark.parametrize(
    "base",
    [
        0,
        0x10_0000,  # RAM
        layout.PCI_HOLE_START - 4 * KIB,
        layout.ECAM_START,  # claimed by ECAM
        layout.IOAPIC_ADDRESS,
        layout.LOCAL_APIC_ADDRESS,
        0xFFFF_F000,  # firmware
    ],
)
def test_memory_outside_the_windows(rig: Rig, base: int) -> None:
    """A BAR over RAM, ECAM, interrupt controllers or firmware is not decoded."""
    slot, (device,) = rig.add((BarKind.MEMORY32, 4 * KIB))
    rig.write(slot, Register.BAR0, base)
    rig.write(slot, Register.COMMAND, Command.MEMORY_SPACE, 2)
    rig.mmio.read(base, 4)
    assert device.reads == []
    assert base == rig.read(slot, Register.BAR0)


@pytest.mark.parametrize("base", [0, 0x3F8, 0xFF0, 0x1_0000, 0xFFFF_FFF0])
def test_ports_outside_the_window(rig: Rig, base: int) -> None:
    """An I/O BAR over the machine's own ports, or beyond 64 KiB, is not decoded."""
    slot, (device,) = rig.add((BarKind.IO, 16))
    rig.write(slot, Register.BAR0, base)
    rig.write(slot, Register.COMMAND, Command.IO_SPACE, 2)
    rig.pio.read(base & 0xFFFF, 1)
    assert device.reads == []


def test_firmware_may_allocate_below_the_ioapic(rig: Rig) -> None:
    """A BAR that firmware allocates downward from the IOAPIC is decoded as well."""
    slot, _ = rig.add((BarKind.MEMORY32, 4 * KIB))
    base = layout.IOAPIC_ADDRESS - 4 * KIB
    rig.write(slot, Register.BAR0, base)
    rig.write(slot, Register.COMMAND, Command.MEMORY_SPACE, 2)
    assert rig.mmio.read(base, 4) == 0x1234_5678


def test_overlapping_bars(rig: Rig) -> None:
    """The first of two overlapping BARs stays; the other appears when there is room."""
    first, (first_device,) = rig.add((BarKind.MEMORY32, 8 * KIB))
    second, (second_device,) = rig.add((BarKind.MEMORY32, 4 * KIB))
    for slot, base in ((first, MEMORY_BASE), (second, MEMORY_BASE + 4 * KIB)):
        rig.write(slot, Register.BAR0, base)
        rig.write(slot, Register.COMMAND, Command.MEMORY_SPACE, 2)
    rig.mmio.read(MEMORY_BASE + 4 * KIB, 4)
    assert (first_device.reads, second_device.reads) == ([(4 * KIB, 4)], [])
    rig.write(first, Register.COMMAND, 0, 2)
    rig.mmio.read(MEMORY_BASE + 4 * KIB, 4)
    assert (first_device.reads, second_device.reads) == ([(4 * KIB, 4)], [(0, 4)])


# Assignment for guests without firmware


def test_assignment(rig: Rig) -> None:
    """Every BAR gets an aligned address of its own, and is decoded."""
    kinds = ((BarKind.IO, 32), (BarKind.MEMORY32, 64 * KIB), (BarKind.MEMORY64, 16))
    slots = [rig.add(*kinds) for _ in range(10)]
    rig.host.assign_bars()
    ranges = []
    for slot, _ in slots:
        ports = rig.read(slot, Register.BAR0) & ~3
        low = rig.read(slot, Register.BAR0 + 4)
        high = rig.read(slot, Register.BAR0 + 8) & ~0xF
        assert rig.pio.read(ports, 4) == 0x1234_5678
        assert rig.mmio.read(low, 4) == rig.mmio.read(high, 4) == 0x1234_5678
        assert (ports % 32, low % (64 * KIB), high % (4 * KIB)) == (0, 0, 0)
        assert layout.PCI_IO_START <= ports < 0x1_0000
        ranges += [(low, 64 * KIB), (high, 4 * KIB)]
    assert all(
        layout.PCI_MMIO32_START <= base <= layout.PCI_MMIO32_START + layout.PCI_MMIO32_SIZE - size
        for base, size in ranges
    )
    assert rig.read(slots[0][0], Register.COMMAND, 2) == Command.IO_SPACE | Command.MEMORY_SPACE
    assert rig.read(0, Register.COMMAND, 2) == 0


def test_assignment_wastes_nothing(rig: Rig) -> None:
    """Large BARs are placed first, so that a full window is really full."""
    half = layout.PCI_MMIO32_SIZE // 2
    rig.add((BarKind.MEMORY32, 16), (BarKind.MEMORY32, half // 2))
    slot, _ = rig.add((BarKind.MEMORY32, half))
    rig.host.assign_bars()
    assert rig.read(slot, Register.BAR0) == layout.PCI_MMIO32_START


def test_assignment_above_4g(rig: Rig) -> None:
    """A 64-bit BAR that does not fit below 4 GiB goes into the high window, if there is one."""
    slot, _ = rig.add((BarKind.MEMORY64, 8 * GIB))
    with pytest.raises(SpecError, match="no room"):
        rig.host.assign_bars()
    rig.host.assign_bars(mmio64=(6 * GIB, 64 * GIB))
    assert rig.read(slot, Register.BAR0 + 4) == 2
    assert rig.mmio.read(8 * GIB, 4) == 0x1234_5678


# Reset and snapshots


def test_reset(rig: Rig) -> None:
    """A reset takes every BAR from the buses; assignment puts them back."""
    slot, _ = rig.add((BarKind.MEMORY32, 4 * KIB))
    rig.host.assign_bars()
    base = rig.read(slot, Register.BAR0)
    rig.pio.write(layout.PORT_RESET, 1, 0x06)
    rig.host.reset()
    assert rig.pio.read(layout.PORT_RESET, 1) == 0
    assert rig.pio.read(ADDRESS, 4) == 0
    assert rig.mmio.read(base, 4) == 0xFFFF_FFFF
    assert rig.read(slot, Register.BAR0) == 0
    assert rig.read(slot, Register.INTERRUPT_LINE, 1) == layout.PIC_PCI_INTX[1]
    rig.host.assign_bars()
    assert rig.mmio.read(base, 4) == 0x1234_5678


def test_snapshot(rig: Rig) -> None:
    """Another host with the same functions decodes the same ranges."""
    slot, _ = rig.add((BarKind.MEMORY32, 4 * KIB))
    rig.write(slot, Register.BAR0, MEMORY_BASE)
    rig.write(slot, Register.COMMAND, Command.MEMORY_SPACE, 2)
    other = Rig()
    other.add((BarKind.MEMORY32, 4 * KIB))
    other.host.restore(rig.host.save())
    assert rig.host.save() == other.host.save()
    assert other.mmio.read(MEMORY_BASE, 4) == 0x1234_5678


def test_snapshot_of_other_devices(rig: Rig) -> None:
    """A snapshot with other slots is refused."""
    state = rig.host.save()
    rig.add()
    with pytest.raises(StateError, match="in other slots"):
        rig.host.restore(state)


# Hostile guests

REGISTERS = st.one_of(
    st.integers(0, layout.ECAM_SIZE - 8),
    st.sampled_from([slot << 15 | at for slot in range(3) for at in range(0, 0x40, 4)]),
)
VALUES = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sampled_from((0, 3, 7, 0xFFFF_FFFF, MEMORY_BASE, MEMORY_BASE + 4 * KIB, IO_BASE)),
)
SIZES = st.sampled_from((1, 2, 4, 8))


@given(
    st.lists(st.tuples(st.booleans(), REGISTERS, SIZES, VALUES), max_size=60),
    st.lists(st.tuples(st.booleans(), st.integers(0, 7), SIZES, VALUES), max_size=40),
)
def test_any_access_is_survived(ecam: list[Operation], ports: list[Operation]) -> None:
    """No writes raise anything, and the buses agree with the registers afterwards."""
    rig = Rig()
    kinds = ((BarKind.IO, 16), (BarKind.MEMORY32, 4 * KIB), (BarKind.MEMORY64, 8 * KIB))
    slots = [rig.add(*kinds) for _ in range(2)]
    exercise(EcamWindow(rig.host), ecam)
    exercise(rig.host, ports)
    for slot, _ in slots:
        rig.write(slot, Register.COMMAND, 0, 2)
    assert rig.host._decoded == {}
    rig.host.assign_bars()
    assert len(rig.host._decoded) == 6
