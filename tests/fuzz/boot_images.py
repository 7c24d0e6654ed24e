"""Fuzz target: boot images of every kind, opened and loaded into guest memory.

They load, or are refused in one line that names the file.
"""

from __future__ import annotations

import os

from tests.fuzz.inputs import check_line
from tests.unit.boot.test_hostile import IMAGES
from vmm_kvm.arch.x86.image import BootConfig, load, open_image
from vmm_kvm.arch.x86.layout import ram_ranges
from vmm_kvm.bits import MIB
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

MEMORY_SIZE = 32 * MIB
CONFIG = BootConfig(cache_directory=None)


def run(data: bytes) -> None:
    """Load an image."""
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        path = f"/proc/self/fd/{fd}"
        with GuestMemory(ram_ranges(MEMORY_SIZE)) as memory:
            refusal = f"{path}: "
            try:
                load(open_image(path), memory, CONFIG)
            except BootError as err:
                refusal = str(err)
            check_line(refusal)
            assert refusal.startswith(f"{path}: ")
    finally:
        os.close(fd)


def seeds() -> list[bytes]:
    """Return the images of the tests that are not large."""
    return [image for image in IMAGES.values() if len(image) <= 32 << 10]
