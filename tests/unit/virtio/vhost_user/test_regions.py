"""Guest memory that a device process maps: translation, limits, and bad regions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm_kvm.errors import GuestMemoryError
from vmm_kvm.virtio.vhost_user.messages import MemoryRegion, VhostUserError
from vmm_kvm.virtio.vhost_user.regions import SLOTS_MAX, Regions

SIZE = 0x4000
USER = 0x7F00_0000_0000


@pytest.fixture
def memfd() -> Iterator[int]:
    """A memfd of 64 KiB whose byte N has the value of its page."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(fd, b"".join(bytes([page]) * 4096 for page in range(16)))
    yield fd
    os.close(fd)


def test_two_regions_of_one_file(memfd: int) -> None:
    """Views by guest-physical address are the right place of the file, for reads and writes."""
    regions = Regions()
    regions.add(MemoryRegion(0x10_0000, SIZE, USER + 0x10_0000, 0x4000), memfd)
    regions.add(MemoryRegion(0, SIZE, USER, 0), memfd)
    assert len(regions) == 2
    assert bytes(regions.view(0x3FFE, 2)) == b"\x03\x03"
    assert bytes(regions.view(0x10_0FFF, 2)) == b"\x04\x05"
    regions.view(0x10_0000, 3)[:] = b"abc"
    assert os.pread(memfd, 4, 0x4000) == b"abc\x04"
    assert regions.guest_address(USER + 0x10_3FFF) == 0x10_3FFF
    regions.clear()


def test_a_region_may_begin_within_a_page(memfd: int) -> None:
    """An offset that is no multiple of the page size can be mapped."""
    regions = Regions()
    regions.add(MemoryRegion(0x1000, 0x2000, USER, 0x0FFF), memfd)
    assert bytes(regions.view(0x1000, 2)) == b"\x00\x01"
    assert len(regions.view(0x2FFF, 1)) == 1


@pytest.mark.parametrize(
    ("gpa", "size"), [(0xFFF, 2), (0x4FFF, 2), (0x5000, 1), (0, 0), (0x1000, -1), (2**64, 1)]
)
def test_memory_outside_is_refused(memfd: int, gpa: int, size: int) -> None:
    """A view reaches neither before nor after its region."""
    regions = Regions()
    regions.add(MemoryRegion(0x1000, SIZE, USER, 0), memfd)
    with pytest.raises(GuestMemoryError):
        regions.view(gpa, size)


def test_a_user_address_outside_is_refused(memfd: int) -> None:
    """A user address in no region is the front-end's mistake."""
    regions = Regions()
    regions.add(MemoryRegion(0x1000, SIZE, USER, 0), memfd)
    for address in (USER - 1, USER + SIZE, 0):
        with pytest.raises(VhostUserError, match="in no memory region"):
            regions.guest_address(address)


@pytest.mark.parametrize(
    "region",
    [
        MemoryRegion(0, 0, USER, 0),
        MemoryRegion(2**64 - 0x1000, 0x2000, USER, 0),
        MemoryRegion(0, 0x2000, 2**64 - 0x1000, 0),
        MemoryRegion(0, 0x10001, USER, 0),
        MemoryRegion(0, 0x1000, USER, 0x10000),
        MemoryRegion(0, 0x1000, USER, 2**64 - 0x1000),
        MemoryRegion(0, 2**63, USER, 0),
        MemoryRegion(0x23000, 0x2000, USER + 0x90000, 0),
        MemoryRegion(0x80000, 0x2000, USER + 0x23FFF, 0),
    ],
)
def test_a_bad_region_is_refused(memfd: int, region: MemoryRegion) -> None:
    """A region that is empty, wraps, overlaps, or leaves its file is not mapped."""
    regions = Regions()
    regions.add(MemoryRegion(0x20000, SIZE, USER + 0x20000, 0), memfd)
    with pytest.raises(VhostUserError, match="memory region"):
        regions.add(region, memfd)
    assert len(regions) == 1


def test_a_file_that_cannot_be_mapped_is_refused() -> None:
    """A pipe, or a read-only file, is refused as guest memory."""
    regions = Regions()
    read_end, write_end = os.pipe()
    with Path("/proc/self/exe").open("rb") as program:
        for fd in (read_end, program.fileno()):
            with pytest.raises(VhostUserError, match="cannot be mapped"):
                regions.add(MemoryRegion(0, 0x1000, USER, 0), fd)
    os.close(read_end)
    os.close(write_end)


def test_removal_needs_the_same_addresses(memfd: int) -> None:
    """A region is removed by guest address, user address and size; a view outlives it."""
    regions = Regions()
    region = MemoryRegion(0x1000, SIZE, USER, 0)
    regions.add(region, memfd)
    view = regions.view(0x1000, 1)
    for other in (region._replace(size=0x1000), region._replace(user_address=0)):
        with pytest.raises(VhostUserError, match="unknown"):
            regions.remove(other)
    regions.remove(region._replace(mmap_offset=7))
    assert len(regions) == 0
    assert bytes(view) == b"\x00"
    with pytest.raises(GuestMemoryError):
        regions.view(0x1000, 1)
    regions.add(region, memfd)
    assert len(regions.view(0x1000, SIZE)) == SIZE


def test_there_is_a_limit(memfd: int) -> None:
    """A front-end cannot use up this process's mappings and descriptors."""
    regions = Regions()
    for number in range(SLOTS_MAX):
        regions.add(MemoryRegion(number << 12, 0x1000, number << 12, 0), memfd)
    with pytest.raises(VhostUserError, match=f"more than {SLOTS_MAX}"):
        regions.add(MemoryRegion(1 << 40, 0x1000, 1 << 40, 0), memfd)
