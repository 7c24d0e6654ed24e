"""Linux: a bzImage's header, the placement of its parts, and the entry into the kernel."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.boot.images import CODE, KERNEL_ADDRESS, BzImage, ElfSpec, vmlinux
from tests.unit.boot.packing import PACKERS
from vmm_kvm.arch.x86.acpi import AcpiConfig, build_tables
from vmm_kvm.arch.x86.e820 import e820_map, encode
from vmm_kvm.arch.x86.entry import CR0_ET, CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME, Entry
from vmm_kvm.arch.x86.image import BootConfig, BootImage, LinuxImage, load
from vmm_kvm.arch.x86.layout import ram_ranges
from vmm_kvm.arch.x86.linux import ElfImage
from vmm_kvm.bits import MIB
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

Open = Callable[[bytes], BootImage]

VMLINUX = vmlinux()
PACKED = BzImage(PACKERS["gzip"](VMLINUX))
STUB_SIZE = 0x300
OWN_DECOMPRESSOR = BootConfig(unpack=False)
PARAMS = 0x7000


def _u32(memory: GuestMemory, offset: int) -> int:
    return int.from_bytes(memory.read(PARAMS + offset, 4), "little")


def _u64(memory: GuestMemory, offset: int) -> int:
    return int.from_bytes(memory.read(PARAMS + offset, 8), "little")


def _is_vmlinux_there(memory: GuestMemory) -> bool:
    return memory.read(KERNEL_ADDRESS, len(CODE)) == CODE and memory.read(
        KERNEL_ADDRESS + MIB, len(CODE) + 0x5000
    ) == CODE[::-1] + bytes(0x5000)


def _descriptor(memory: GuestMemory, entry: Entry, selector: int) -> int:
    assert selector + 7 <= entry.gdt_limit
    return int.from_bytes(memory.read(entry.gdt_base + selector, 8), "little")


def _walk(memory: GuestMemory, cr3: int, address: int) -> int:
    """Translate `address` as the processor does, by 2 MiB pages."""
    table = cr3
    for shift in (39, 30, 21):
        index = address >> shift & 511
        item = int.from_bytes(memory.read(table + 8 * index, 8), "little")
        assert item & 3 == 3, "not present or not writable"
        table = item & 0x000F_FFFF_FFFF_F000
    assert item & 0x80, "not a large page"
    return table | address & 0x1F_FFFF


@pytest.mark.parametrize("kind", PACKERS)
def test_enters_the_unpacked_kernel(open_bytes: Open, memory: GuestMemory, kind: str) -> None:
    """In any format of the payload, vmlinux is placed where it is linked and entered there."""
    image = open_bytes(BzImage(PACKERS[kind](VMLINUX)).build())
    entry = load(image, memory, BootConfig())
    assert (entry.rip, _is_vmlinux_there(memory)) == (KERNEL_ADDRESS, True)


def test_second_start_takes_the_kernel_from_the_cache(open_bytes: Open, tmp_path: Path) -> None:
    """The unpacked kernel is kept, and a load from the cache is equal."""
    image = open_bytes(PACKED.build())
    config = BootConfig(cache_directory=str(tmp_path / "kernels"))
    for _ in range(2):
        with GuestMemory(ram_ranges(64 * MIB)) as memory:
            assert load(image, memory, config).rip == KERNEL_ADDRESS
            assert _is_vmlinux_there(memory)
    assert len([p for p in (tmp_path / "kernels").iterdir() if not p.suffix]) == 1


def test_processor_state(open_bytes: Open, memory: GuestMemory) -> None:
    """64-bit mode with the selectors that the protocol names, and boot_params in RSI."""
    entry = load(open_bytes(PACKED.build()), memory, BootConfig())
    assert (
        entry.cr0,
        entry.cr4,
        entry.efer,
        entry.rflags,
    ) == (CR0_PE | CR0_ET | CR0_PG, CR4_PAE, EFER_LME | EFER_LMA, 2)
    assert (
        entry.registers,
        entry.code.selector,
        entry.data.selector,
    ) == ({"rsi": PARAMS}, 0x10, 0x18)


def test_descriptor_table(open_bytes: Open, memory: GuestMemory) -> None:
    """The GDT agrees with the hidden parts of the segment registers."""
    entry = load(open_bytes(PACKED.build()), memory, BootConfig())
    assert _descriptor(memory, entry, 0x10) == 0x00AF_9B00_0000_FFFF
    assert _descriptor(memory, entry, 0x18) == 0x00CF_9300_0000_FFFF


@pytest.mark.parametrize("address", [0, PARAMS, KERNEL_ADDRESS + 123, 0xFFFF_FFFF])
def test_page_tables_map_4_gib(open_bytes: Open, memory: GuestMemory, address: int) -> None:
    """Every address below 4 GiB is mapped to itself."""
    entry = load(open_bytes(PACKED.build()), memory, BootConfig())
    assert address == _walk(memory, entry.cr3, address)


def test_boot_params(open_bytes: Open, memory: GuestMemory) -> None:
    """The zero page has the kernel's header, the loader's fields, the memory map and the RSDP."""
    tables = build_tables(AcpiConfig())
    config = BootConfig(command_line="console=ttyS0 root=/dev/vda", acpi=tables)
    load(open_bytes(PACKED.build()), memory, config)
    assert memory.read(PARAMS + 0x202, 6) == b"HdrS\x0f\x02"
    assert memory.read(PARAMS + 0x1FA, 2) == b"\xff\xff"
    assert memory.read(PARAMS + 0x210, 1)[0] == 0xFF
    assert memory.read(_u32(memory, 0x228), 28) == b"console=ttyS0 root=/dev/vda\0"
    map_ = encode(e820_map(memory.regions))
    assert len(map_) // 20 == memory.read(PARAMS + 0x1E8, 1)[0]
    assert map_ == memory.read(PARAMS + 0x2D0, len(map_))
    assert tables.rsdp == _u64(memory, 0x70)
    assert tables.blob == memory.read(tables.base, len(tables.blob))


def test_nothing_before_or_behind_the_header(open_bytes: Open, memory: GuestMemory) -> None:
    """Bytes outside the header and the loader's fields are zero, above all the sentinel."""
    load(open_bytes(PACKED.build()), memory, BootConfig())
    assert bytes(0x1E8) == memory.read(PARAMS, 0x1E8)
    assert bytes(8) == memory.read(PARAMS + 0x1E9, 8)
    assert bytes(0x2D0 - 0x26C) == memory.read(PARAMS + 0x26C, 0x2D0 - 0x26C)


def test_random_seed(open_bytes: Open, memory: GuestMemory) -> None:
    """The kernel gets 32 random bytes, different ones each time."""
    image = open_bytes(PACKED.build())
    seeds = set()
    for _ in range(2):
        load(image, memory, BootConfig())
        at = _u64(memory, 0x250)
        assert struct.unpack("<QII", memory.read(at, 16)) == (0, 9, 32)
        seeds.add(memory.read(at + 16, 32))
    assert len(seeds) == 2


def test_no_random_seed(open_bytes: Open, memory: GuestMemory) -> None:
    """Without a seed there is no list of setup data."""
    load(open_bytes(PACKED.build()), memory, BootConfig(seed=False))
    assert _u64(memory, 0x250) == 0


@pytest.mark.parametrize(
    ("command_line", "flags"),
    [(None, 3), ("quiet nokaslr", 1), ("nokaslr=1 xnokaslr", 3)],
)
def test_kaslr_flag(
    open_bytes: Open, memory: GuestMemory, command_line: str | None, flags: int
) -> None:
    """The kernel may randomise its regions unless the command line says otherwise."""
    load(open_bytes(PACKED.build()), memory, BootConfig(command_line=command_line))
    assert flags == memory.read(PARAMS + 0x211, 1)[0]


def test_own_decompressor(open_bytes: Open, memory: GuestMemory) -> None:
    """On request the protected-mode part is placed, and entered 0x200 after its start."""
    entry = load(open_bytes(PACKED.build()), memory, OWN_DECOMPRESSOR)
    assert entry.rip == KERNEL_ADDRESS + 0x200
    assert PACKED.payload == memory.read(KERNEL_ADDRESS + STUB_SIZE, len(PACKED.payload))
    assert (memory.read(PARAMS + 0x211, 1)[0], _u32(memory, 0x214)) == (1, KERNEL_ADDRESS)


@pytest.mark.parametrize(
    "payload",
    [
        b"\x89LZO\0\r\n\x1a\n" + bytes(100),
        PACKERS["xz"](b"not an executable" * 10),
        PACKERS["gzip"](ElfSpec(is_64=False, machine=3).build()),
        PACKERS["gzip"](ElfSpec(entry=0x1234).build()),
        PACKERS["gzip"](ElfSpec(entry=KERNEL_ADDRESS, type=3).build()),
        b"",
    ],
)
def test_falls_back_to_the_decompressor(
    open_bytes: Open, memory: GuestMemory, payload: bytes
) -> None:
    """A payload that the host cannot unpack or enter directly is left to the kernel itself."""
    entry = load(open_bytes(BzImage(payload).build()), memory, BootConfig())
    assert entry.rip == KERNEL_ADDRESS + 0x200


def test_kernel_linked_elsewhere_falls_back(open_bytes: Open, memory: GuestMemory) -> None:
    """A kernel that must move from its link address is left to its decompressor."""
    image = open_bytes(PACKED.but(pref_address=32 * MIB).build())
    assert load(image, memory, BootConfig()).rip == 32 * MIB + 0x200


def test_32_bit_kernel(open_bytes: Open, memory: GuestMemory) -> None:
    """A kernel without a 64-bit entry is entered at its start, without paging."""
    entry = load(open_bytes(PACKED.but(xloadflags=0).build()), memory, BootConfig())
    assert (entry.rip, entry.cr0, entry.cr3, entry.efer) == (KERNEL_ADDRESS, CR0_PE | CR0_ET, 0, 0)
    assert _descriptor(memory, entry, entry.code.selector) == 0x00CF_9B00_0000_FFFF


def test_relocatable_kernel_goes_low_if_it_must(open_bytes: Open) -> None:
    """In little memory the decompressor starts below its preferred address."""
    with GuestMemory(ram_ranges(8 * MIB)) as memory:
        entry = load(open_bytes(PACKED.build()), memory, OWN_DECOMPRESSOR)
    assert entry.rip == 2 * MIB + 0x200


@pytest.mark.parametrize("fields", [{}, {"relocatable_kernel": 0}])
def test_too_little_memory(open_bytes: Open, fields: dict[str, int]) -> None:
    """A kernel that does not fit is refused with the memory that it needs."""
    image = open_bytes(PACKED.but(**fields).build())
    with GuestMemory(ram_ranges(4 * MIB)) as memory, pytest.raises(BootError) as caught:
        load(image, memory, OWN_DECOMPRESSOR)
    assert str(caught.value).endswith("does not fit in 4 MiB of memory")
    assert "image: needs 4 MiB at 0x" in str(caught.value)


def test_unpacked_kernel_in_too_little_memory(open_bytes: Open) -> None:
    """An unpacked kernel that does not fit is refused the same way."""
    image = open_bytes(PACKED.build())
    with GuestMemory(ram_ranges(17 * MIB)) as memory, pytest.raises(BootError) as caught:
        load(image, memory, BootConfig())
    assert str(caught.value).endswith("bytes do not fit in 17 MiB of memory")


def test_initrd_is_placed_high(open_bytes: Open, memory: GuestMemory, tmp_path: Path) -> None:
    """The initrd ends on the last page of RAM."""
    (tmp_path / "initrd").write_bytes(CODE)
    load(open_bytes(PACKED.build()), memory, BootConfig(initrd=(f"{tmp_path}/initrd",)))
    address, size = _u32(memory, 0x218), _u32(memory, 0x21C)
    assert (address, memory.read(address, size)) == (64 * MIB - 0x3000, CODE)


def test_initrds_are_one(open_bytes: Open, memory: GuestMemory, tmp_path: Path) -> None:
    """Several initrds follow each other on multiples of four bytes."""
    (tmp_path / "a").write_bytes(b"abcde")
    (tmp_path / "b").write_bytes(b"fgh")
    files = (f"{tmp_path}/a", f"{tmp_path}/b")
    load(open_bytes(PACKED.build()), memory, BootConfig(initrd=files))
    contents = memory.read(_u32(memory, 0x218), _u32(memory, 0x21C))
    assert contents == b"abcde\0\0\0fgh\0"


def test_initrd_stays_below_the_kernels_limit(
    open_bytes: Open, memory: GuestMemory, tmp_path: Path
) -> None:
    """The kernel's initrd_addr_max is the last byte that the initrd may occupy."""
    (tmp_path / "initrd").write_bytes(CODE)
    image = open_bytes(PACKED.but(initrd_addr_max=0x1FF_FFFF).build())
    load(image, memory, BootConfig(initrd=(f"{tmp_path}/initrd",)))
    assert _u32(memory, 0x218) == 0x200_0000 - 0x3000


def test_initrd_too_large(open_bytes: Open, memory: GuestMemory, tmp_path: Path) -> None:
    """An initrd that would cover the kernel is refused."""
    path = tmp_path / "initrd"
    path.touch()
    with path.open("r+b") as file:
        file.truncate(50 * MIB)
    with pytest.raises(BootError) as caught:
        load(open_bytes(PACKED.build()), memory, BootConfig(initrd=(str(path),)))
    assert str(caught.value).startswith(f"{path}: initrd: 0x3200000 bytes do not fit between")


def test_command_line_length(open_bytes: Open, memory: GuestMemory) -> None:
    """A command line may have as many bytes as the kernel takes, not one more."""
    image = open_bytes(PACKED.but(cmdline_size=10).build())
    load(image, memory, BootConfig(command_line="0123456789"))
    with pytest.raises(BootError) as caught:
        load(image, memory, BootConfig(command_line="0123456789a"))
    assert str(caught.value).endswith("image: command line: 11 bytes, the kernel takes 10")


def test_command_line_with_nul(open_bytes: Open, memory: GuestMemory) -> None:
    """A NUL would end the command line early."""
    with pytest.raises(BootError, match="contains a NUL character"):
        load(open_bytes(PACKED.build()), memory, BootConfig(command_line="a\0b"))


def test_modules_are_refused(open_bytes: Open, memory: GuestMemory) -> None:
    """Linux takes initrds, not modules."""
    with pytest.raises(BootError, match="image: a Linux kernel takes no modules: mod"):
        load(open_bytes(PACKED.build()), memory, BootConfig(modules=(("mod", ""),)))


def test_vmlinux_without_a_header(open_bytes: Open, memory: GuestMemory) -> None:
    """A bare vmlinux is entered like an unpacked one, with a header made up for it."""
    image = open_bytes(VMLINUX)
    entry = load(image, memory, BootConfig(command_line="quiet"))
    assert isinstance(image, ElfImage)
    assert (entry.rip, _is_vmlinux_there(memory)) == (KERNEL_ADDRESS, True)
    assert b"\x55\xaa" + bytes(2) + b"HdrS\x0c\x02" == memory.read(PARAMS + 0x1FE, 10)
    assert memory.read(_u32(memory, 0x228), 6) == b"quiet\0"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"boot_flag": 0}, "boot flag is 0x0, not 0xaa55"),
        ({"jump": 0x90}, "ends at 0x26c, not 0x264 or behind"),
        ({"header_size": 0x20}, "ends at 0x222, not 0x264 or behind"),
        ({"header_size": 0xFF}, "ends at 0x301, not 0x264 or behind"),
        ({"version": 0x205}, "boot protocol 2.05, 2.06 or later is needed"),
        ({"version": 0x300}, "boot protocol 3.00, 2.06 or later is needed"),
        ({"loadflags": 0}, "a zImage, which is loaded below 1 MiB, is not supported"),
        ({"setup_sects": 200}, "truncated: "),
        ({"syssize": 0}, "truncated: 0x0 bytes"),
        ({"syssize": 0xFFFF_FFFF}, "truncated: 0xffffffff0 bytes"),
        ({"payload_offset": 0xFFFF_FFFF}, "payload: "),
        ({"payload_length": 0xFFFF_FFFF}, "payload: 0xffffffff bytes at 0x300"),
        ({"kernel_alignment": 0}, "kernel alignment is 0x0"),
        ({"kernel_alignment": 0x30_0000}, "kernel alignment is 0x300000"),
        ({"kernel_alignment": 0x8000_0000}, "kernel alignment is 0x80000000"),
        ({"pref_address": 0}, "preferred address is 0x0"),
        ({"pref_address": 0xFFFF_FFFF_FFE0_0000}, "preferred address is 0xffffffffffe00000"),
        ({"pref_address": KERNEL_ADDRESS + 1}, "preferred address is 0x1000001"),
        ({"init_size": 0}, "needs 0x0 bytes to start a kernel of"),
        ({"init_size": 0xFFFF_FFFF}, "needs 0xffffffff bytes to start a kernel of"),
    ],
)
def test_broken_fields(open_bytes: Open, fields: dict[str, int], message: str) -> None:
    """Each header field with an impossible value has an error of its own."""
    with pytest.raises(BootError) as caught:
        open_bytes(PACKED.but(**fields).build())
    assert f"image: Linux header: {message}" in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"setup_sects": 0},
        {"initrd_addr_max": 0},
        {"cmdline_size": 0xFFFF_FFFF},
        {"xloadflags": 1},
        {"relocatable_kernel": 0, "kernel_alignment": 0},
        {"version": 0x20A, "xloadflags": 0},
        {"version": 0x207, "header_size": 0x46, "payload_length": 0xFFFF_FFFF},
    ],
)
def test_odd_fields(open_bytes: Open, memory: GuestMemory, fields: dict[str, int]) -> None:
    """Odd values that have a meaning, or that this protocol version ignores, are no error."""
    setup = 4 if "setup_sects" in fields else 3
    image = open_bytes(BzImage(PACKED.payload, setup, fields=fields).build())
    assert isinstance(image, LinuxImage)
    assert load(image, memory, BootConfig()).rip >= MIB


@pytest.mark.parametrize("size", [0x206, 0x263, 0x300, 0x800, 0xA00])
def test_truncated(open_bytes: Open, size: int) -> None:
    """A bzImage that ends early is truncated, at any length."""
    with pytest.raises(BootError, match="image: Linux header: truncated"):
        open_bytes(PACKED.build()[:size])


def test_size_is_rounded_up(open_bytes: Open, memory: GuestMemory) -> None:
    """A file that ends within its last paragraph is whole, as memtest86+ does."""
    whole = BzImage(bytes(range(1, 100))).build()
    assert load(open_bytes(whole[:-8]), memory, OWN_DECOMPRESSOR).rip == KERNEL_ADDRESS + 0x200
    with pytest.raises(BootError, match="truncated"):
        open_bytes(whole[:-16])


def test_damaged_payload(open_bytes: Open, memory: GuestMemory) -> None:
    """A payload in a known format that does not unpack is an error, not a guest that hangs."""
    payload = bytearray(PACKED.payload)
    payload[100] ^= 0xFF
    with pytest.raises(BootError, match=r"image: gzip payload: damaged: "):
        load(open_bytes(BzImage(bytes(payload)).build()), memory, BootConfig())


def test_payload_larger_than_the_kernel_needs(open_bytes: Open, memory: GuestMemory) -> None:
    """A payload that claims more than the memory the kernel starts in is not unpacked."""
    payload = PACKED.payload[:-4] + struct.pack("<I", 0xFFFF_FFFF)
    with pytest.raises(BootError, match="unpacks to 0xffffffff bytes, not 0x400000 or less"):
        load(open_bytes(BzImage(payload).build()), memory, BootConfig())


def test_a_program_with_a_kernels_header_needs_a_bios(open_bytes: Open) -> None:
    """A kernel without a 32-bit entry, such as ipxe.lkrn, is refused: its code is real-mode."""
    with pytest.raises(BootError, match="no Linux kernel, but a program that needs a BIOS"):
        open_bytes(BzImage().but(code32_start=0, xloadflags=0).build())


def test_an_empty_initrd_beside_another_is_refused(
    open_bytes: Open, memory: GuestMemory, tmp_path: Path
) -> None:
    """An empty initrd is a mistake beside others, as it is alone."""
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.write_bytes(b"x")
    empty.touch()
    for files in ((full, empty), (empty, full)):
        image, config = open_bytes(BzImage().build()), BootConfig(initrd=tuple(map(str, files)))
        with pytest.raises(BootError, match="empty: empty file"):
            load(image, memory, config)
