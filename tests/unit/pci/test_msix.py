"""MSI-X: delivery, masks, pending bits, and the routes of irqfds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import Operation, exercise
from vmm_kvm.bits import PAGE_SIZE
from vmm_kvm.errors import SpecError
from vmm_kvm.pci.config import PciFunction
from vmm_kvm.pci.ids import Register
from vmm_kvm.pci.msix import (
    CONTROL_ENABLE,
    CONTROL_FUNCTION_MASK,
    ENTRY_SIZE,
    Msix,
    MsixMessage,
)

VECTORS = 5
LOCAL_APIC = 0xFEE0_0000


class Rig:
    """MSI-X with its function, the messages sent, and the routes announced."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []
        self.routes: list[tuple[int, MsixMessage | None]] = []
        self.msix = Msix(
            VECTORS,
            lambda address, data: self.sent.append((address, data)),
            on_route_change=lambda vector, message: self.routes.append((vector, message)),
        )
        self.function = PciFunction(vendor_id=1, device_id=1, class_code=0)
        self.msix.attach(self.function, 4)
        self.capability = self.function.read_config(Register.CAPABILITIES, 1)

    def read(self, offset: int, size: int = 4) -> int:
        """Read the BAR."""
        with self.msix.lock:
            return self.msix.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Write the BAR."""
        with self.msix.lock:
            self.msix.write(offset, size, value)

    def control(self, value: int) -> None:
        """Write message control."""
        self.function.write_config(self.capability + 2, 2, value)

    def program(self, vector: int, data: int, *, masked: bool = False) -> None:
        """Fill in a table entry."""
        at = vector * ENTRY_SIZE
        self.write(at, LOCAL_APIC)
        self.write(at + 4, 0)
        self.write(at + 8, data)
        self.write(at + 12, int(masked))

    @property
    def pending(self) -> int:
        """The first pending bits."""
        return self.read(self.msix.pba_offset)


@pytest.fixture
def rig() -> Rig:
    """Five vectors, enabled, with vectors 0 to 3 programmed and unmasked."""
    rig = Rig()
    for vector in range(4):
        rig.program(vector, 0x40 + vector)
    rig.control(CONTROL_ENABLE)
    rig.routes.clear()
    return rig


def test_capability() -> None:
    """The capability has the table's size, and the places of table and pending bits."""
    rig = Rig()
    assert rig.function.read_config(rig.capability, 1) == 0x11
    assert rig.function.read_config(rig.capability + 2, 2) == VECTORS - 1
    assert rig.function.read_config(rig.capability + 4, 4) == 4
    assert rig.function.read_config(rig.capability + 8, 4) == rig.msix.pba_offset | 4
    assert [(bar.number, bar.size) for bar in rig.function.bars] == [(4, 2 * PAGE_SIZE)]


def test_message_control_keeps_its_two_bits() -> None:
    """Enable and function mask can be written; the table size cannot."""
    rig = Rig()
    rig.control(0xFFFF)
    control = rig.function.read_config(rig.capability + 2, 2)
    assert control == CONTROL_ENABLE | CONTROL_FUNCTION_MASK | VECTORS - 1


@pytest.mark.parametrize(
    ("vectors", "bar_size"), [(1, 8192), (256, 8192), (257, 16384), (2048, 65536)]
)
def test_bar_size(vectors: int, bar_size: int) -> None:
    """Table and pending bits have pages of their own in one BAR."""
    assert bar_size == Msix(vectors, lambda *_: None).bar_size


@pytest.mark.parametrize("vectors", [0, -1, 2049])
def test_impossible_counts(vectors: int) -> None:
    """A function with no vector, or more than 2048, is refused."""
    with pytest.raises(SpecError):
        Msix(vectors, lambda *_: None)


def test_vectors_are_masked_at_first() -> None:
    """Before a driver programs it, every vector is masked and empty."""
    rig = Rig()
    assert [rig.read(at) for at in range(0, VECTORS * ENTRY_SIZE, 4)] == [0, 0, 0, 1] * VECTORS


def test_delivery(rig: Rig) -> None:
    """A notification sends the message of the table entry."""
    rig.msix.notify(0)
    rig.msix.notify(3)
    assert rig.sent == [(LOCAL_APIC, 0x40), (LOCAL_APIC, 0x43)]
    assert rig.pending == 0


def test_sixty_four_bit_addresses(rig: Rig) -> None:
    """Address and data may be written as qwords; the address is 64 bits, dword-aligned."""
    rig.write(ENTRY_SIZE, 0x1_FEE0_1003, 8)
    rig.write(ENTRY_SIZE + 8, 0x77, 8)
    rig.msix.notify(1)
    assert rig.sent == [(0x1_FEE0_1000, 0x77)]
    assert rig.read(ENTRY_SIZE, 8) == 0x1_FEE0_1000


def test_nothing_is_sent_while_disabled() -> None:
    """Without the enable bit notifications are lost: the function uses INTx."""
    rig = Rig()
    rig.program(0, 0x40)
    states = [rig.msix.is_enabled]
    rig.msix.notify(0)
    rig.control(CONTROL_ENABLE)
    states.append(rig.msix.is_enabled)
    assert states == [False, True]
    assert (rig.sent, rig.pending) == ([], 0)


@pytest.mark.parametrize("vector", [-1, VECTORS, 1 << 16, 0xFFFF])
def test_vectors_that_do_not_exist(rig: Rig, vector: int) -> None:
    """A notification of a vector that does not exist does nothing."""
    rig.msix.notify(vector)
    assert (rig.sent, rig.pending) == ([], 0)


def test_masked_vector_waits(rig: Rig) -> None:
    """A masked vector sets its pending bit; unmasking sends once, by the current entry."""
    rig.program(2, 0x42, masked=True)
    rig.msix.notify(2)
    rig.msix.notify(2)
    assert (rig.sent, rig.pending) == ([], 1 << 2)
    rig.write(2 * ENTRY_SIZE + 8, 0x99)
    assert rig.sent == []
    rig.write(2 * ENTRY_SIZE + 12, 0)
    assert (rig.sent, rig.pending) == ([(LOCAL_APIC, 0x99)], 0)


def test_function_mask(rig: Rig) -> None:
    """The function mask holds every vector back; pending ones are sent when it is cleared."""
    rig.control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK)
    rig.program(1, 0x41, masked=True)
    for vector in (0, 1, 3):
        rig.msix.notify(vector)
    assert (rig.sent, rig.pending) == ([], 0b1011)
    rig.control(CONTROL_ENABLE)
    assert (rig.sent, rig.pending) == ([(LOCAL_APIC, 0x40), (LOCAL_APIC, 0x43)], 0b0010)


def test_pending_bits_are_read_only(rig: Rig) -> None:
    """Writing pending bits changes nothing; every size reads them."""
    rig.program(2, 0, masked=True)
    rig.msix.notify(2)
    rig.write(rig.msix.pba_offset, 0)
    assert rig.read(rig.msix.pba_offset, 1) == 0b100
    assert rig.read(rig.msix.pba_offset, 8) == 0b100
    assert rig.read(rig.msix.pba_offset + 1, 1) == 0
    assert rig.read(rig.msix.pba_offset + 8, 8) == 0


def test_reserved_bits_read_as_zero(rig: Rig) -> None:
    """Vector control has only its mask bit; between table and pending bits nothing is stored."""
    rig.write(12, 0xFFFF_FFFF)
    assert rig.read(12) == 1
    rig.write(VECTORS * ENTRY_SIZE, 0xFFFF_FFFF)
    assert rig.read(VECTORS * ENTRY_SIZE) == 0
    rig.write(VECTORS * ENTRY_SIZE - 4, 0xFFFF_FFFF_0000_0000, 8)
    assert rig.read(VECTORS * ENTRY_SIZE - 4, 8) == 0


def test_routes_are_announced(rig: Rig) -> None:
    """The keeper of irqfd routes is called at every change of delivery, and at no other."""
    rig.write(8, 0x40)  # unchanged
    assert rig.routes == []
    rig.write(8, 0x50)
    rig.write(12, 1)
    rig.write(8, 0x60)
    rig.write(12, 0)
    assert rig.routes == [
        (0, MsixMessage(LOCAL_APIC, 0x50)),
        (0, None),
        (0, MsixMessage(LOCAL_APIC, 0x60)),
    ]
    rig.routes.clear()
    rig.control(0)
    assert rig.routes == [(vector, None) for vector in range(4)]


def test_reset(rig: Rig) -> None:
    """Reset withdraws every route and pending bit, and masks all vectors."""
    rig.program(2, 0, masked=True)
    rig.msix.notify(2)
    rig.function.reset()
    rig.msix.reset()
    assert not rig.msix.is_enabled
    assert rig.pending == 0
    assert rig.read(12) == 1
    assert rig.routes[-1] == (3, None)
    assert rig.sent == []


def test_snapshot(rig: Rig) -> None:
    """Another function continues from a snapshot: routes are announced, pending bits kept."""
    rig.program(2, 0x42, masked=True)
    rig.msix.notify(2)
    other = Rig()
    other.function.restore(rig.function.save())
    other.msix.restore(rig.msix.save())
    assert rig.msix.save() == other.msix.save()
    assert other.routes == [
        (vector, MsixMessage(LOCAL_APIC, 0x40 + vector)) for vector in (0, 1, 3)
    ]
    other.write(2 * ENTRY_SIZE + 12, 0)
    assert other.sent == [(LOCAL_APIC, 0x42)]


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 0x2010),
            st.sampled_from((1, 2, 4, 8)),
            st.integers(0, (1 << 64) - 1),
        ),
        max_size=60,
    ),
    st.lists(st.integers(-2, VECTORS + 2), max_size=20),
)
def test_any_access_is_survived(operations: list[Operation], vectors: list[int]) -> None:
    """No accesses and notifications raise anything; a vector is sent or pending, not both."""
    rig = Rig()
    rig.control(CONTROL_ENABLE)
    exercise(rig.msix, operations)
    for vector in vectors:
        sent, pending = len(rig.sent), rig.pending
        rig.msix.notify(vector)
        if 0 <= vector < VECTORS:
            assert (len(rig.sent) > sent) != bool(rig.pending >> vector & 1)
        else:
            assert (sent, pending) == (len(rig.sent), rig.pending)
