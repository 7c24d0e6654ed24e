"""Guest memory: its allocation, and bounds that no access crosses."""

import ctypes
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_kvm.bits import GIB, KIB, MIB, PAGE_SIZE
from vmm_kvm.errors import GuestMemoryError, Refusal, RefusedError, SpecError
from vmm_kvm.memfd import make_scratch
from vmm_kvm.memory import GuestMemory, Region, Run, adopt, freeze

RANGES = ((0, 64 * KIB), (0x10_0000, 64 * KIB))


def test_regions_follow_each_other_in_the_memfd() -> None:
    """Regions keep their guest addresses; in the memfd they are contiguous."""
    with GuestMemory(RANGES) as memory:
        assert memory.size == 128 * KIB
        assert memory.regions == (
            Region(0, 64 * KIB, 0),
            Region(0x10_0000, 64 * KIB, 64 * KIB),
        )
        assert memory.regions[1].end == 0x11_0000
        assert os.fstat(memory.fd).st_size == 128 * KIB


def test_writes_are_read_back() -> None:
    """A write at an address is read back, and is at the region's place in the memfd."""
    with GuestMemory(RANGES) as memory:
        memory.write(0x10_0010, b"guest")
        assert memory.read(0x10_0010, 5) == b"guest"
        assert os.pread(memory.fd, 5, 64 * KIB + 0x10) == b"guest"


def test_private_memory_is_nobody_elses() -> None:
    """Private memory has no memfd, and starts on a huge page of the host."""
    with GuestMemory(RANGES, is_private=True) as memory:
        memory.write(0x10_0000 + 64 * KIB - 5, b"guest")
        assert memory.read(0x10_0000 + 64 * KIB - 5, 5) == b"guest"
        assert memory.fd == -1
        assert memory.hva % (2 << 20) == 0
        assert ctypes.string_at(memory.hva + 128 * KIB - 5, 5) == b"guest"


def test_views_are_the_memory_itself() -> None:
    """A view sees later writes and writes through."""
    with GuestMemory(RANGES) as memory:
        view = memory.view(0x100, 4)
        memory.write(0x101, b"\x07")
        view[2] = 9
        assert memory.read(0x100, 4) == b"\x00\x07\x09\x00"


def test_large_memory_is_sparse() -> None:
    """Allocating RAM costs address space, not memory; above 4 GiB too."""
    with GuestMemory(((0, GIB), (4 * GIB, GIB))) as memory:
        memory.write(5 * GIB - 1, b"\x01")
        assert os.fstat(memory.fd).st_blocks * 512 <= 2 * 1024 * KIB


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (64 * KIB - 1, 2),  # leaves the first region
        (64 * KIB, 1),  # in the hole
        (0x10_0000 - 1, 2),  # enters the second region
        (0, 0x11_0000),  # spans the hole
        (0x11_0000, 1),
        (-1, 1),
        (-1, 2),
        (0, -1),
        ((1 << 64) - 1, 1),
        (1 << 64, 16),
        (0, 1 << 64),
    ],
)
def test_accesses_outside_ram_are_refused(gpa: int, size: int) -> None:
    """An access that is not inside one region raises, with the access in the error."""
    with GuestMemory(RANGES) as memory:
        with pytest.raises(GuestMemoryError) as caught:
            memory.read(gpa, size)
        assert (caught.value.gpa, caught.value.size) == (gpa, size)
        assert not memory.contains(gpa, size) or size < 0


def test_a_refused_write_changes_nothing() -> None:
    """A write that starts in RAM but leaves it changes nothing."""
    with GuestMemory(RANGES) as memory:
        with pytest.raises(GuestMemoryError):
            memory.write(64 * KIB - 2, b"abcd")
        assert memory.read(64 * KIB - 2, 2) == b"\0\0"


@pytest.mark.parametrize(
    "ranges",
    [
        (),
        ((1, PAGE_SIZE),),
        ((0, PAGE_SIZE + 1),),
        ((0, 0),),
        ((0, -PAGE_SIZE),),
        ((0, 2 * PAGE_SIZE), (PAGE_SIZE, PAGE_SIZE)),
        ((PAGE_SIZE, PAGE_SIZE), (0, PAGE_SIZE)),
    ],
)
def test_impossible_ranges_are_refused(ranges: tuple[tuple[int, int], ...]) -> None:
    """Ranges that are unaligned, empty, not ascending or not disjoint are refused."""
    with pytest.raises(SpecError):
        GuestMemory(ranges)


def test_closing_twice() -> None:
    """Closing is idempotent and leaves no descriptor; afterwards there is no RAM."""
    memory = GuestMemory(RANGES)
    fd = memory.fd
    memory.close()
    memory.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(GuestMemoryError):
        memory.read(0, 1)


@given(st.integers(-PAGE_SIZE, 0x12_0000), st.integers(0, 0x12_0000))
def test_an_access_is_inside_one_region_or_refused(gpa: int, size: int) -> None:
    """`contains` and `view` agree, and views have the requested length."""
    with GuestMemory(RANGES) as memory:
        inside = any(base <= gpa and gpa + size <= base + length for base, length in RANGES)
        assert inside == memory.contains(gpa, size)
        if inside:
            assert len(memory.view(gpa, size)) == size
        else:
            with pytest.raises(GuestMemoryError):
                memory.view(gpa, size)


@pytest.mark.parametrize("is_private", [False, True])
def test_only_what_was_touched_is_there(is_private: bool) -> None:
    """Only written pages count as resident, with those that the host adds to them."""
    with GuestMemory(((0, 64 * MIB),), is_private=is_private) as memory:
        assert memory.resident_size() == 0
        memory.write(5, b"guest")
        memory.write(40 * MIB, b"guest")
        assert memory.resident_size() in {2 * PAGE_SIZE, 4 * MIB}  # maybe in huge pages


def test_other_memory_can_be_attached() -> None:
    """Attached memory is reached at its address, is in no region, and is released at the end."""
    other = bytearray(PAGE_SIZE)
    with GuestMemory(RANGES) as memory:
        memory.attach(4 * GIB, memoryview(other))
        memory.write(4 * GIB + 8, b"guest")
        assert other[8:13] == b"guest"
        assert len(memory.regions) == len(RANGES)
        for gpa, size in ((4 * GIB - 1, 2), (4 * GIB + PAGE_SIZE - 1, 2), (4 * GIB, PAGE_SIZE + 1)):
            with pytest.raises(GuestMemoryError):
                memory.view(gpa, size)
    with pytest.raises(GuestMemoryError):
        memory.view(4 * GIB, 1)


@pytest.mark.parametrize("is_private", [False, True])
def test_more_memory_than_there_can_be(is_private: bool) -> None:
    """The message has the requested size, and the reason."""
    with pytest.raises(RefusedError, match="68719476736 MiB of memory: ") as caught:
        GuestMemory(((0, 1 << 56),), is_private=is_private)
    assert caught.value.refusal is Refusal.ENOMEM


FROZEN = ((0, 5 * MIB), (16 * MIB, 3 * MIB))


def test_frozen_memory_is_a_copy_from_which_its_owner_goes_on() -> None:
    """Later writes are the owner's alone; no process can change the copy."""
    with GuestMemory(FROZEN, is_private=True) as memory:
        for gpa in (0, 3 * MIB, 16 * MIB, 19 * MIB - 1):
            memory.write(gpa, b"\x07")
        fd = freeze(memory, "test", lambda: True)
        assert fd is not None
        # Untouched memory takes no room, and a page is the smallest unit.
        assert os.fstat(fd).st_blocks * 512 == 4 * PAGE_SIZE
        assert [memory.read(gpa, 1) for gpa in (0, 3 * MIB, 19 * MIB - 1)] == [b"\x07"] * 3
        memory.write(0, b"\x08")
        memory.write(MIB, b"\x08")
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"\x09", 0)
        for _ in range(2):
            with GuestMemory(FROZEN, is_private=True, mapped=(fd, 0)) as clone:
                assert [clone.read(gpa, 1) for gpa in (0, MIB, 3 * MIB, 16 * MIB)] == [
                    *(b"\x07", b"\0", b"\x07", b"\x07")
                ]
                clone.write(0, b"\x0a")
                assert clone.read(19 * MIB - 1, 1) == b"\x07"
        assert memory.read(0, 1) == b"\x08"
        os.close(fd)


def _mapped_size() -> int:
    pages, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(pages) * PAGE_SIZE


def test_a_copy_that_cannot_be_mapped_harms_nothing(tmp_path: Path) -> None:
    """The memory has what it had."""
    fd = os.open(tmp_path / "copy", os.O_CREAT | os.O_WRONLY)  # to be mapped it has to be read
    with GuestMemory(FROZEN, is_private=True) as memory:
        memory.write(3 * MIB, b"\x07")
        os.pwrite(fd, b"\x08", 3 * MIB)
        before = _mapped_size()
        with pytest.raises(PermissionError):
            adopt(memory, fd)
        os.close(fd)
        assert _mapped_size() == before
        assert memory.read(3 * MIB, 1) == b"\x07"
        memory.write(3 * MIB, b"\x08")


def test_memory_goes_on_from_a_copy_that_was_made_of_it() -> None:
    """Unwritten pages are the copy's, and empty ones hold none, twice in a row."""
    with GuestMemory(FROZEN, is_private=True) as memory:
        for number in (7, 8):
            for gpa in (3 * MIB, 16 * MIB):
                memory.write(gpa, bytes([number]))
            fd = make_scratch("test")
            os.ftruncate(fd, memory.size)
            for region in memory.regions:
                for at in range(0, region.size, PAGE_SIZE):
                    data = memory.read(region.gpa + at, PAGE_SIZE)  # which makes pages of zeros
                    if data.strip(b"\0"):
                        os.pwrite(fd, data, region.offset + at)
            finish = adopt(memory, fd)
            # Pieces are of 2 MiB, from the start of each region.
            first = Run(0 if number == 8 else 2 * MIB, 4 * MIB)
            assert memory.files == [first, Run(5 * MIB, 7 * MIB)]
            assert memory.resident_size() <= 3 * MIB
            before = _mapped_size()
            finish()
            assert before - _mapped_size() >= memory.size
            read = [memory.read(gpa, 1)[0] for gpa in (0, 3 * MIB, 16 * MIB, 19 * MIB - 1)]
            assert read == [0 if number == 7 else 9, number, number, 0]
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"\x09", 0)
            memory.write(3 * MIB, b"\x09")
            memory.write(0, b"\x09")
            with GuestMemory(FROZEN, is_private=True, mapped=(fd, 0)) as clone:
                assert clone.read(3 * MIB, 1)[0] == number
                assert clone.read(0, 1) == (b"\0" if number == 7 else b"\x09")
            os.close(fd)


def test_freezing_that_is_given_up_harms_nothing() -> None:
    """The memory is unchanged, and no descriptor is left open."""
    calls = iter((True, True, False))
    with GuestMemory(FROZEN, is_private=True) as memory:
        memory.write(0, b"\x07")
        memory.write(18 * MIB, b"\x07")
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone
        assert freeze(memory, "test", lambda: next(calls)) is None
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - names alone
        assert memory.read(0, 1) == memory.read(18 * MIB, 1) == b"\x07"
        memory.write(0, b"\x08")
        assert memory.read(0, 1) == b"\x08"
