"""PCI functions: writable bits of configuration space, BARs, capabilities, INTx."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import RecordingDevice, RecordingIrqLine
from vmm_kvm.bits import GIB, KIB, all_ones
from vmm_kvm.errors import SpecError
from vmm_kvm.pci.config import BarKind, PciFunction
from vmm_kvm.pci.ids import CONFIG_SIZE, CapabilityId, Command, Register, Status

COMMAND_BITS = int(
    Command.IO_SPACE
    | Command.MEMORY_SPACE
    | Command.BUS_MASTER
    | Command.PARITY_ERROR_RESPONSE
    | Command.SERR_ENABLE
    | Command.INTERRUPT_DISABLE
)


def make(intx: RecordingIrqLine | None = None) -> PciFunction:
    """Make a network function, with an INTA pin if a line is given."""
    return PciFunction(
        vendor_id=0x1AF4,
        device_id=0x1041,
        class_code=0x02_00_00,
        revision_id=1,
        subsystem_vendor_id=0x0B5D,
        subsystem_id=0x0001,
        interrupt_pin=1 if intx else 0,
        intx=intx,
    )


# Header


def test_header() -> None:
    """The identity is at the specification's places."""
    function = make(RecordingIrqLine())
    assert function.read_config(Register.VENDOR_ID, 4) == 0x1041_1AF4
    assert function.read_config(Register.REVISION_ID, 4) == 0x02_00_00_01
    assert function.read_config(Register.SUBSYSTEM_VENDOR_ID, 4) == 0x0001_0B5D
    assert function.read_config(Register.INTERRUPT_PIN, 1) == 1
    assert function.read_config(Register.HEADER_TYPE, 1) == 0
    assert function.read_config(Register.STATUS, 2) == 0


def test_only_writable_bits_are_written() -> None:
    """A guest that writes ones everywhere changes the command, cache line, latency and IRQ line."""
    function = make(RecordingIrqLine())
    before = [function.read_config(at, 1) for at in range(CONFIG_SIZE)]
    for at in range(0, CONFIG_SIZE, 4):
        function.write_config(at, 4, 0xFFFF_FFFF)
    after = [function.read_config(at, 1) for at in range(CONFIG_SIZE)]
    before[Register.COMMAND] = COMMAND_BITS & 0xFF
    before[Register.COMMAND + 1] = COMMAND_BITS >> 8
    before[Register.CACHE_LINE_SIZE] = before[Register.LATENCY_TIMER] = 0xFF
    before[Register.INTERRUPT_LINE] = 0xFF
    assert before == after
    assert function.command == COMMAND_BITS
    assert function.is_bus_master


@pytest.mark.parametrize(("offset", "size"), [(0xFD, 4), (0x100, 1), (0xFFF, 1), (0xFF, 2)])
def test_behind_the_end(offset: int, size: int) -> None:
    """Conventional configuration space ends after 256 bytes; ones follow."""
    function = make()
    assert all_ones(size) == function.read_config(offset, size)
    assert not function.write_config(offset, size, 0)


def test_bytes_and_words() -> None:
    """Narrow writes change their bytes alone."""
    function = make()
    function.write_config(Register.COMMAND + 1, 1, Command.INTERRUPT_DISABLE >> 8)
    function.write_config(Register.COMMAND, 1, Command.MEMORY_SPACE)
    assert function.command == Command.INTERRUPT_DISABLE | Command.MEMORY_SPACE
    assert function.read_config(Register.CLASS_CODE + 2, 1) == 0x02


def test_status_errors_are_cleared_by_ones() -> None:
    """The error bits of the status register are cleared by ones; others do not change."""
    function = make()
    function.poke(Register.STATUS, 2, Status.PARITY_ERROR | Status.RECEIVED_MASTER_ABORT)
    function.write_config(Register.STATUS, 2, Status.PARITY_ERROR | Status.INTERRUPT)
    assert function.read_config(Register.STATUS, 2) == Status.RECEIVED_MASTER_ABORT


@pytest.mark.parametrize(("pin", "has_line"), [(1, False), (0, True), (5, True), (-1, True)])
def test_pin_and_line_belong_together(pin: int, has_line: bool) -> None:
    """A pin without a line, or a line without a pin, is refused."""
    with pytest.raises(SpecError):
        PciFunction(
            vendor_id=1,
            device_id=1,
            class_code=0,
            interrupt_pin=pin,
            intx=RecordingIrqLine() if has_line else None,
        )


# BARs


@pytest.mark.parametrize(
    ("kind", "size", "prefetchable", "sized"),
    [
        (BarKind.IO, 4, False, 0xFFFF_FFFD),
        (BarKind.IO, 256, False, 0xFFFF_FF01),
        (BarKind.MEMORY32, 16, False, 0xFFFF_FFF0),
        (BarKind.MEMORY32, 64 * KIB, True, 0xFFFF_0008),
        (BarKind.MEMORY32, 2 * GIB, False, 0x8000_0000),
        (BarKind.MEMORY64, 16 * KIB, False, 0xFFFF_FFFF_FFFF_C004),
        (BarKind.MEMORY64, 8 * GIB, True, 0xFFFF_FFFE_0000_000C),
    ],
)
def test_sizing(kind: BarKind, size: int, prefetchable: bool, sized: int) -> None:
    """After writing ones a read tells size and kind; writing the address back restores it."""
    function = make()
    function.add_bar(2, kind, size, RecordingDevice(), is_prefetchable=prefetchable)
    bar = function.bars[0]
    flags = sized & bar.flag_bits
    assert flags == function.read_config(bar.register, 4)
    for at in range(bar.register, bar.register + bar.width, 4):
        assert function.write_config(at, 4, 0xFFFF_FFFF)
    assert sized == function.read_config(bar.register, bar.width)
    address = sized & ~bar.flag_bits & ~(1 << 8 * bar.width - 1) or size
    function.write_config(bar.register, bar.width, address)
    assert address | flags == function.read_config(bar.register, bar.width)
    assert address == function.bar_address(bar)


def test_absent_bars_are_zero() -> None:
    """A BAR that was not added, and the expansion ROM, size as zero."""
    function = make()
    function.add_bar(0, BarKind.MEMORY32, 16, RecordingDevice())
    for register in (*range(Register.BAR0 + 4, Register.BAR0 + 24, 4), Register.EXPANSION_ROM):
        function.write_config(register, 4, 0xFFFF_FFFF)
        assert function.read_config(register, 4) == 0


@pytest.mark.parametrize(
    ("index", "kind", "size"),
    [
        (-1, BarKind.IO, 4),
        (6, BarKind.IO, 4),
        (5, BarKind.MEMORY64, 16),
        (1, BarKind.MEMORY32, 16),  # taken
        (0, BarKind.MEMORY64, 16),  # its upper half is taken
        (2, BarKind.MEMORY32, 16),  # the upper half of another
        (4, BarKind.IO, 2),
        (4, BarKind.IO, 512),
        (4, BarKind.MEMORY32, 8),
        (4, BarKind.MEMORY32, 48),
        (4, BarKind.MEMORY32, 4 * GIB),
        (4, BarKind.MEMORY32, 0),
    ],
)
def test_impossible_bars(index: int, kind: BarKind, size: int) -> None:
    """A BAR that does not exist, is taken, or has a wrong size for its kind is refused."""
    function = make()
    function.add_bar(1, BarKind.MEMORY64, 16, RecordingDevice())
    with pytest.raises(SpecError):
        function.add_bar(index, kind, size, RecordingDevice())


def test_decoding_follows_the_command_register() -> None:
    """I/O and memory BARs are decoded as their command bits say."""
    function = make()
    function.add_bar(0, BarKind.IO, 4, RecordingDevice())
    function.add_bar(1, BarKind.MEMORY32, 16, RecordingDevice())
    decoded = []
    for command in (0, Command.IO_SPACE, Command.MEMORY_SPACE):
        assert function.write_config(Register.COMMAND, 2, command)
        decoded.append([function.is_decoded(bar) for bar in function.bars])
    assert decoded == [[False, False], [True, False], [False, True]]


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (Register.STATUS, 2, False),
        (Register.VENDOR_ID, 4, False),
        (Register.COMMAND, 1, True),
        (Register.COMMAND, 4, True),
        (Register.CACHE_LINE_SIZE, 4, False),
        (Register.BAR0, 1, True),
        (Register.BAR0 + 20, 4, True),
        (Register.BAR0 + 24, 4, False),
        (Register.INTERRUPT_LINE, 1, False),
    ],
)
def test_writes_tell_whether_decoding_may_change(offset: int, size: int, expected: bool) -> None:
    """Only the command register and BARs move ranges."""
    assert expected == make().write_config(offset, size, 0)


# Capabilities


def test_capability_list() -> None:
    """Capabilities are linked in the order of their addition, at dwords; the status bit is set."""
    function = make()
    first = function.add_capability(CapabilityId.VENDOR_SPECIFIC, b"\x05abc")
    second = function.add_capability(CapabilityId.MSI_X, bytes(10))
    assert (first, second) == (0x40, 0x48)
    assert function.read_config(Register.STATUS, 2) == Status.CAPABILITIES
    assert function.read_config(Register.CAPABILITIES, 1) == first
    assert function.read_config(first, 2) == second << 8 | CapabilityId.VENDOR_SPECIFIC
    assert function.read_config(first + 2, 4) == int.from_bytes(b"\x05abc", "little")
    assert function.read_config(second, 2) == CapabilityId.MSI_X


def test_capabilities_are_read_only_but_for_their_mask() -> None:
    """The guest changes exactly the writable bits of a body."""
    function = make()
    offset = function.add_capability(0x09, b"\x11\x22\x33\x44", writable=b"\x00\x0f")
    for at in range(offset, offset + 6):
        function.write_config(at, 1, 0xFF)
    assert function.read_config(offset + 2, 4) == 0x44_33_2F_11
    assert function.read_config(offset, 2) == 0x0009


def test_capability_callbacks() -> None:
    """Callbacks are called for accesses that touch the capability; for reads, before them."""
    reads: list[tuple[int, int]] = []
    writes: list[tuple[int, int]] = []

    def fill(at: int, size: int) -> None:
        reads.append((at, size))
        function.poke(offset + 4, 1, 0x5A)

    function = make()
    offset = function.add_capability(
        0x09,
        bytes(6),
        writable=b"\xff" * 6,
        on_read=fill,
        on_write=lambda at, size: writes.append((at, size)),
    )
    assert function.read_config(offset + 4, 2) == 0x5A
    function.write_config(offset + 6, 2, 0xABCD)
    function.write_config(offset + 8, 4, 0)
    function.read_config(offset - 4, 4)
    function.write_config(offset - 2, 4, 0)
    assert reads == [(4, 2)]
    assert writes == [(6, 2), (-2, 4)]


def test_configuration_space_is_finite() -> None:
    """A capability that does not fit is refused."""
    function = make()
    function.add_capability(0x09, bytes(CONFIG_SIZE - Register.END - 2 - 4))
    function.add_capability(0x09, bytes(2))
    with pytest.raises(SpecError, match="full"):
        function.add_capability(0x09, b"")


# INTx


def test_intx() -> None:
    """The pin drives its line and the status bit."""
    line = RecordingIrqLine()
    function = make(line)
    function.set_intx(True)
    function.set_intx(True)
    assert line.levels == [True]
    assert function.read_config(Register.STATUS, 2) == Status.INTERRUPT
    assert function.read_config(Register.STATUS, 1) == Status.INTERRUPT
    assert function.read_config(Register.COMMAND, 4) == Status.INTERRUPT << 16
    function.set_intx(False)
    assert line.levels == [True, False]
    assert function.read_config(Register.STATUS, 2) == 0


def test_intx_disable() -> None:
    """The command bit takes the line down, not the status; the line returns with it."""
    line = RecordingIrqLine()
    function = make(line)
    function.set_intx(True)
    function.write_config(Register.COMMAND, 2, Command.INTERRUPT_DISABLE)
    assert line.levels == [True, False]
    assert function.read_config(Register.STATUS, 2) == Status.INTERRUPT
    function.write_config(Register.COMMAND, 2, 0)
    assert line.levels == [True, False, True]


def test_intx_without_a_pin() -> None:
    """A function without a pin may interrupt; no line is driven."""
    function = make()
    function.set_intx(True)
    assert function.interrupt_pin == 0


# Reset and snapshots


def test_reset() -> None:
    """A reset restores the built values, and deasserts the pin."""
    line = RecordingIrqLine()
    function = make(line)
    function.add_bar(0, BarKind.MEMORY32, 4096, RecordingDevice(), is_prefetchable=True)
    notified: list[tuple[int, int]] = []
    offset = function.add_capability(
        0x09, bytes(2), writable=b"\xff\xff", on_write=lambda at, size: notified.append((at, size))
    )
    built = [function.peek(at, 4) for at in range(0, CONFIG_SIZE, 4)]
    for at in range(0, CONFIG_SIZE, 4):
        function.write_config(at, 4, 0xFFFF_FFFF)
    function.write_config(Register.COMMAND, 2, 0)
    function.set_intx(True)
    function.reset()
    assert built == [function.peek(at, 4) for at in range(0, CONFIG_SIZE, 4)]
    assert line.levels == [True, False]
    assert notified[-1] == (0, 4)
    assert function.peek(offset + 2, 2) == 0


def test_snapshot() -> None:
    """Another function of the same make continues from a snapshot."""
    function, line = make(RecordingIrqLine()), RecordingIrqLine()
    function.write_config(Register.COMMAND, 2, Command.BUS_MASTER)
    function.write_config(Register.INTERRUPT_LINE, 1, 11)
    function.set_intx(True)
    other = make(line)
    other.restore(function.save())
    assert function.save() == other.save()
    assert line.levels == [True]
    assert other.is_bus_master


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 0x110),
            st.sampled_from((1, 2, 4, 8)),
            st.integers(0, (1 << 64) - 1),
        ),
        max_size=60,
    )
)
def test_any_access_is_survived(operations: list[tuple[bool, int, int, int]]) -> None:
    """No reads and writes raise anything, and the identity stays."""
    function = make(RecordingIrqLine())
    function.add_bar(0, BarKind.MEMORY64, 4096, RecordingDevice())
    function.add_bar(2, BarKind.IO, 16, RecordingDevice())
    function.add_capability(0x09, bytes(14), writable=b"\xff" * 14)
    for is_write, offset, size, value in operations:
        if is_write:
            function.write_config(offset, size, value)
        else:
            assert 0 <= function.read_config(offset, size) <= all_ones(size)
    assert function.read_config(Register.VENDOR_ID, 4) == 0x1041_1AF4
    assert function.read_config(Register.BAR0 + 8, 4) & 0xF == 1
