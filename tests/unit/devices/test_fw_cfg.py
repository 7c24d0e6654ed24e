"""fw_cfg: items, the file directory, the data port, and DMA from guests good and hostile."""

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import Operation, exercise
from vmm_kvm.bits import KIB, MIB, PAGE_SIZE
from vmm_kvm.devices.fw_cfg import SIZE, Control, FwCfg, Key, Register
from vmm_kvm.errors import SpecError
from vmm_kvm.memory import GuestMemory

HOLE = 64 * KIB
RANGES = ((0, HOLE), (MIB, 2 * MIB))
REQUEST = 0x1000
TARGET = MIB
ITEM = 0x8003
CONTENT = bytes(range(100))


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """RAM in two pieces, filled with 0xcc where requests read to."""
    with GuestMemory(RANGES) as memory:
        memory.write(TARGET, b"\xcc" * PAGE_SIZE)
        yield memory


@pytest.fixture
def fw_cfg(memory: GuestMemory) -> FwCfg:
    """A device with one item besides its own."""
    device = FwCfg(memory)
    device.add_item(ITEM, CONTENT)
    return device


def select(device: FwCfg, key: int) -> None:
    """Write the selector."""
    with device.lock:
        device.write(Register.SELECTOR, 2, key)


def read(device: FwCfg, count: int) -> bytes:
    """Read the data port."""
    with device.lock:
        return bytes(device.read(Register.DATA, 1) for _ in range(count))


def swap(value: int) -> int:
    """Return a dword as a little-endian guest writes it into a big-endian register."""
    return int.from_bytes(value.to_bytes(4, "big"), "little")


def start_dma(device: FwCfg, address: int) -> None:
    """Give the device a request's address, in two halves."""
    with device.lock:
        device.write(Register.DMA_ADDRESS_HIGH, 4, swap(address >> 32))
        device.write(Register.DMA_ADDRESS_LOW, 4, swap(address & 0xFFFF_FFFF))


def dma(
    device: FwCfg,
    memory: GuestMemory,
    control: int,
    length: int,
    target: int = TARGET,
) -> int:
    """Run a request and return the control word that the device left."""
    memory.write(REQUEST, struct.pack(">IIQ", control, length, target))
    start_dma(device, REQUEST)
    return int.from_bytes(memory.read(REQUEST, 4), "big")


# Items


def test_signature_and_features(fw_cfg: FwCfg) -> None:
    """The signature is there, and a feature bit for DMA."""
    select(fw_cfg, Key.SIGNATURE)
    assert read(fw_cfg, 4) == b"QEMU"
    select(fw_cfg, Key.ID)
    assert read(fw_cfg, 4) == b"\x03\0\0\0"


def test_signature_is_selected_first(fw_cfg: FwCfg) -> None:
    """Before any selection, and after a reset, the signature is read."""
    assert read(fw_cfg, 4) == b"QEMU"
    select(fw_cfg, ITEM)
    fw_cfg.reset()
    assert read(fw_cfg, 4) == b"QEMU"


def test_data_port_reads_on_and_then_zeros(fw_cfg: FwCfg) -> None:
    """Each read yields the next byte; zeros follow the end; a selection starts over."""
    select(fw_cfg, ITEM)
    assert read(fw_cfg, 103) == CONTENT + bytes(3)
    select(fw_cfg, ITEM)
    assert read(fw_cfg, 2) == CONTENT[:2]


@pytest.mark.parametrize("key", [0x02, 0x20, 0x3FFF, 0xBFFF])
def test_absent_items_are_empty(fw_cfg: FwCfg, key: int) -> None:
    """An item that does not exist reads as zeros."""
    select(fw_cfg, key)
    assert read(fw_cfg, 4) == bytes(4)


def test_write_channel_bit_is_ignored(fw_cfg: FwCfg) -> None:
    """Bit 14 of a selector does not change the selection."""
    select(fw_cfg, ITEM | 0x4000)
    assert read(fw_cfg, 2) == CONTENT[:2]


def test_writes_to_items_are_lost(fw_cfg: FwCfg) -> None:
    """Byte writes to selector and data port change nothing."""
    select(fw_cfg, ITEM)
    with fw_cfg.lock:
        fw_cfg.write(Register.DATA, 1, 0xFF)
        fw_cfg.write(Register.SELECTOR, 1, 0x19)
    assert read(fw_cfg, 2) == CONTENT[:2]


def test_selector_is_write_only(fw_cfg: FwCfg) -> None:
    """Reading the selector gives ones and does not move the item."""
    with fw_cfg.lock:
        assert fw_cfg.read(Register.SELECTOR, 1) == 0xFF
    assert read(fw_cfg, 1) == b"Q"


def test_directory_is_sorted(fw_cfg: FwCfg) -> None:
    """The directory lists size, selector and name by name; selectors follow the additions."""
    fw_cfg.add_file("etc/e820", b"abc")
    fw_cfg.add_file("bootorder", b"\0")
    select(fw_cfg, Key.FILE_DIR)
    assert read(fw_cfg, 4) == b"\0\0\0\x02"
    entries = [struct.unpack(">IHH56s", read(fw_cfg, 64)) for _ in range(2)]
    assert entries == [
        (1, 0x21, 0, b"bootorder".ljust(56, b"\0")),
        (3, 0x20, 0, b"etc/e820".ljust(56, b"\0")),
    ]
    select(fw_cfg, 0x20)
    assert read(fw_cfg, 3) == b"abc"


@pytest.mark.parametrize("name", ["", "x" * 56, "é"])
def test_impossible_names(fw_cfg: FwCfg, name: str) -> None:
    """A name that does not fit the directory, with its terminator, is refused."""
    with pytest.raises(SpecError, match="not a name"):
        fw_cfg.add_file(name, b"")


def test_longest_name(fw_cfg: FwCfg) -> None:
    """A name of 55 characters fits."""
    fw_cfg.add_file("x" * 55, b"")
    select(fw_cfg, Key.FILE_DIR)
    assert read(fw_cfg, 4 + 64)[-56:] == b"x" * 55 + b"\0"


def test_nothing_is_added_twice(fw_cfg: FwCfg) -> None:
    """Names and selectors are unique."""
    fw_cfg.add_file("etc/e820", b"")
    with pytest.raises(SpecError, match="exists"):
        fw_cfg.add_file("etc/e820", b"")
    with pytest.raises(SpecError, match="exists"):
        fw_cfg.add_item(Key.SIGNATURE, b"")


@pytest.mark.parametrize("key", [-1, 0x10000, 0x4000])
def test_impossible_selectors(fw_cfg: FwCfg, key: int) -> None:
    """A selector of more than 16 bits, or with the write bit, is refused."""
    with pytest.raises(SpecError, match="out of range"):
        fw_cfg.add_item(key, b"")


# DMA


def test_dma_signature(fw_cfg: FwCfg) -> None:
    """The address register reads as a signature, at any size."""
    with fw_cfg.lock:
        value = fw_cfg.read(Register.DMA_ADDRESS_HIGH, 8)
        assert value.to_bytes(8, "little") == b"QEMU CFG"
        assert fw_cfg.read(Register.DMA_ADDRESS_LOW, 4).to_bytes(4, "little") == b" CFG"
        assert fw_cfg.read(SIZE - 1, 1) == ord("G")


def test_dma_read(fw_cfg: FwCfg, memory: GuestMemory) -> None:
    """Select and read in one request; the next continues; zeros follow the end."""
    assert dma(fw_cfg, memory, ITEM << 16 | Control.SELECT | Control.READ, 60) == 0
    assert memory.read(TARGET, 61) == CONTENT[:60] + b"\xcc"
    assert dma(fw_cfg, memory, Control.READ, 50) == 0
    assert memory.read(TARGET, 51) == CONTENT[60:] + bytes(10) + CONTENT[50:51]
    assert dma(fw_cfg, memory, Control.READ, 4) == 0
    assert memory.read(TARGET, 4) == bytes(4)


def test_dma_and_data_port_share_the_position(fw_cfg: FwCfg, memory: GuestMemory) -> None:
    """Both interfaces share the position in an item."""
    dma(fw_cfg, memory, ITEM << 16 | Control.SELECT, 0)
    assert read(fw_cfg, 2) == CONTENT[:2]
    dma(fw_cfg, memory, Control.READ, 2)
    assert memory.read(TARGET, 2) == CONTENT[2:4]
    assert read(fw_cfg, 1) == CONTENT[4:5]


def test_dma_skip(fw_cfg: FwCfg, memory: GuestMemory) -> None:
    """Skipping moves the position, at most to the end, without touching the target."""
    assert dma(fw_cfg, memory, ITEM << 16 | Control.SELECT | Control.SKIP, 10, target=HOLE) == 0
    assert read(fw_cfg, 1) == CONTENT[10:11]
    assert dma(fw_cfg, memory, Control.SKIP, 0xFFFF_FFFF) == 0
    assert read(fw_cfg, 1) == b"\0"


def test_dma_write_is_an_error(fw_cfg: FwCfg, memory: GuestMemory) -> None:
    """A write by DMA is an error."""
    assert dma(fw_cfg, memory, ITEM << 16 | Control.SELECT | Control.WRITE, 4) == Control.ERROR
    assert read(fw_cfg, 2) == CONTENT[:2]


def test_dma_of_absent_items(fw_cfg: FwCfg, memory: GuestMemory) -> None:
    """An item that does not exist is zeros through DMA too."""
    assert dma(fw_cfg, memory, 0x7 << 16 | Control.SELECT | Control.READ, 4) == 0
    assert memory.read(TARGET, 5) == b"\0\0\0\0\xcc"


def test_large_items_are_complete(fw_cfg: FwCfg, memory: GuestMemory) -> None:
    """An item larger than one piece of the copy arrives whole, with zeros after it."""
    content = bytes(i * 7 & 0xFF for i in range(MIB - 1))
    fw_cfg.add_file("etc/large", content)
    assert dma(fw_cfg, memory, 0x20 << 16 | Control.SELECT | Control.READ, 2 * MIB) == 0
    assert memory.read(TARGET, MIB - 1) == content
    assert memory.read(TARGET + MIB - 1, MIB + 1) == bytes(MIB + 1)


def test_dma_above_the_hole(fw_cfg: FwCfg, memory: GuestMemory) -> None:
    """A request may lie anywhere in RAM; its address is one 64-bit write, or the low half alone."""
    at = 3 * MIB - 16
    memory.write(at, struct.pack(">IIQ", ITEM << 16 | Control.SELECT, 0, 0))
    with fw_cfg.lock:
        fw_cfg.write(Register.DMA_ADDRESS_HIGH, 8, swap(at) << 32)
    assert memory.read(at, 4) == bytes(4)
    assert read(fw_cfg, 1) == CONTENT[:1]
    memory.write(at, struct.pack(">IIQ", Key.SIGNATURE << 16 | Control.SELECT, 0, 0))
    with fw_cfg.lock:
        fw_cfg.write(Register.DMA_ADDRESS_LOW, 4, swap(at))
    assert read(fw_cfg, 1) == b"Q"


def test_high_half_is_used_once(fw_cfg: FwCfg, memory: GuestMemory) -> None:
    """A request forgets the high half, so that a guest may omit it."""
    start_dma(fw_cfg, 1 << 40)
    memory.write(REQUEST, struct.pack(">IIQ", ITEM << 16 | Control.SELECT, 0, 0))
    with fw_cfg.lock:
        fw_cfg.write(Register.DMA_ADDRESS_LOW, 4, swap(REQUEST))
    assert read(fw_cfg, 1) == CONTENT[:1]


# Hostile requests


@pytest.mark.parametrize(
    ("target", "length"),
    [
        (HOLE, 1),
        (HOLE - 1, 2),
        (MIB - 1, 2),
        (3 * MIB - 1, 2),
        (TARGET, 0xFFFF_FFFF),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, 0xFFFF_FFFF),
        (0xFFFF_FFFF_0000_0000, 4),
    ],
)
def test_targets_outside_ram(fw_cfg: FwCfg, memory: GuestMemory, target: int, length: int) -> None:
    """A read to an address outside RAM fails as a whole: error bit, nothing written or consumed."""
    before = memory.read(TARGET, PAGE_SIZE)
    control = ITEM << 16 | Control.SELECT | Control.READ
    assert dma(fw_cfg, memory, control, length, target) == Control.ERROR
    assert before == memory.read(TARGET, PAGE_SIZE)
    assert read(fw_cfg, 1) == CONTENT[:1]


@pytest.mark.parametrize("address", [HOLE, MIB - 16, 3 * MIB, 1 << 40, (1 << 64) - 1])
def test_requests_outside_ram(fw_cfg: FwCfg, memory: GuestMemory, address: int) -> None:
    """A request that cannot be read is dropped."""
    before = [memory.read(base, size) for base, size in RANGES]
    start_dma(fw_cfg, address)
    assert before == [memory.read(base, size) for base, size in RANGES]
    assert read(fw_cfg, 1) == b"Q"


def test_request_at_the_edge_of_ram(fw_cfg: FwCfg, memory: GuestMemory) -> None:
    """A request of which only the control word is RAM gets its error bit."""
    memory.write(HOLE - 4, struct.pack(">I", ITEM << 16 | Control.SELECT))
    start_dma(fw_cfg, HOLE - 4)
    assert memory.read(HOLE - 4, 4) == struct.pack(">I", Control.ERROR)
    assert read(fw_cfg, 1) == b"Q"


def test_request_that_reads_over_itself(fw_cfg: FwCfg, memory: GuestMemory) -> None:
    """The control word is written last, over any data that the request read there."""
    assert dma(fw_cfg, memory, ITEM << 16 | Control.SELECT | Control.READ, 16, REQUEST) == 0
    assert memory.read(REQUEST, 16) == bytes(4) + CONTENT[4:16]


def test_narrow_writes_start_nothing(fw_cfg: FwCfg, memory: GuestMemory) -> None:
    """Bytes and words written to the address register are lost."""
    memory.write(0, struct.pack(">IIQ", ITEM << 16 | Control.SELECT, 0, 0))
    with fw_cfg.lock:
        for size in (1, 2):
            for offset in range(Register.DMA_ADDRESS_HIGH, SIZE, size):
                fw_cfg.write(offset, size, 0)
    assert read(fw_cfg, 1) == b"Q"


# Snapshots


def test_snapshot(fw_cfg: FwCfg, memory: GuestMemory) -> None:
    """Another device with the same items continues at the snapshot's position."""
    select(fw_cfg, ITEM)
    read(fw_cfg, 7)
    with fw_cfg.lock:
        fw_cfg.write(Register.DMA_ADDRESS_HIGH, 4, swap(9))
    other = FwCfg(memory)
    other.add_item(ITEM, CONTENT)
    other.restore(fw_cfg.save())
    assert fw_cfg.save() == other.save()
    assert read(other, 2) == CONTENT[7:9]


OPERATIONS = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(0, 15),
        st.sampled_from((1, 2, 4, 8)),
        st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, 0x40).map(swap)),
    ),
    max_size=40,
)


@given(OPERATIONS, st.binary(min_size=64, max_size=128))
def test_any_access_is_survived(operations: list[Operation], requests: bytes) -> None:
    """With any port writes and any bytes in requests, nothing raises."""
    with GuestMemory(((0, PAGE_SIZE),)) as memory:
        memory.write(0, requests)
        device = FwCfg(memory)
        device.add_file("etc/file", CONTENT)
        exercise(device, operations)
