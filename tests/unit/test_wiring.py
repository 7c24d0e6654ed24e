"""Places of devices: the boot order for firmware, and memory that is a disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm_kvm.bits import GIB, MIB
from vmm_kvm.block.mapped import MappedImage
from vmm_kvm.boot_device import BootDevice
from vmm_kvm.machine.wiring import boot_order, place_pmem
from vmm_kvm.virtio.pmem import PmemSpec


@pytest.mark.parametrize(
    ("device", "disk", "cdrom", "expected"),
    [
        (BootDevice.AUTO, 2, 3, None),
        (BootDevice.DISK, 2, 3, b"/pci@i0cf8/scsi@2/disk@0,0\nHALT\0"),
        (BootDevice.DISK, 12, None, b"/pci@i0cf8/scsi@c/disk@0,0\nHALT\0"),
        (BootDevice.DISK, None, 3, None),
        (BootDevice.CDROM, 2, 3, b"/pci@i0cf8/scsi@3/channel@0/disk@0,0\nHALT\0"),
        (BootDevice.CDROM, 2, None, None),
        (BootDevice.NET, 2, 3, b"HALT\0"),
    ],
)
def test_boot_order(
    device: BootDevice, disk: int | None, cdrom: int | None, expected: bytes | None
) -> None:
    """The boot order has the chosen device and no other, if it exists; slots are hexadecimal."""
    assert boot_order(device, disk, cdrom) == expected


@pytest.mark.parametrize(
    ("memory_end", "places", "end"),
    [
        (512 * MIB, [4 * GIB, 5 * GIB], 5 * GIB + 4 * MIB),
        (4 * GIB, [4 * GIB, 5 * GIB], 5 * GIB + 4 * MIB),
        (6 * GIB + MIB, [7 * GIB, 8 * GIB], 8 * GIB + 4 * MIB),
    ],
)
def test_memory_that_is_a_disk(
    tmp_path: Path, memory_end: int, places: list[int], end: int
) -> None:
    """Each memory disk is above all RAM, on a multiple of 1 GiB; the end of all is known."""
    images = []
    for index, size in enumerate((2 * MIB, 4 * MIB)):
        path = tmp_path / f"{index}.img"
        path.write_bytes(bytes(size))
        images.append(MappedImage(str(path)))
    disks = [PmemSpec(image, "disk") for image in images]
    assert place_pmem(disks, memory_end) == (dict(zip(disks, places, strict=True)), end)
    assert place_pmem([], memory_end) == ({}, memory_end)
    for image in images:
        image.close()
