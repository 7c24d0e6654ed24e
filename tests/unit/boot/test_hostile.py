"""Corrupted images of every kind: each either loads or is one line, within bounds.

`VMM_FUZZ_COUNT` corruptions of each image are tried (`make fuzz` sets 1,000), from
`VMM_FUZZ_SEED`: truncations, flipped bits, bytes and words of extreme value, pieces that are
moved, removed or repeated. Only BootError may be raised.
"""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.boot.images import (
    BZIMAGE_FIELDS,
    BzImage,
    firmware,
    multiboot_elf,
    multiboot_flat,
    openbsd_kernel,
    pvh_kernel,
    vmlinux,
)
from tests.unit.boot.packing import PACKERS
from vmm_kvm.arch.x86.image import BootConfig, load, open_image
from vmm_kvm.arch.x86.layout import ram_ranges
from vmm_kvm.bits import MIB
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

COUNT = int(os.environ.get("VMM_FUZZ_COUNT", "60"))
SEED = int(os.environ.get("VMM_FUZZ_SEED", "1"))
SECONDS_MAX = 5.0
"""The limit for one image; many times more than any of them takes."""
HEADERS_SIZE = 0x300
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, (1 << 63), (1 << 64) - 1)

IMAGES: dict[str, bytes] = {
    **{f"bzimage-{kind}": BzImage(pack(vmlinux())).build() for kind, pack in PACKERS.items()},
    "vmlinux": vmlinux(),
    "pvh": pvh_kernel(),
    "multiboot-elf32": multiboot_elf(),
    "multiboot-elf64": multiboot_elf(is_64=True),
    "multiboot-flat": multiboot_flat(),
    "openbsd-amd64": openbsd_kernel(),
    "openbsd-i386": openbsd_kernel(is_64=False),
    "openbsd-gzip": PACKERS["gzip"](openbsd_kernel()),
    "firmware": firmware(),
}

Change = Callable[[random.Random, bytearray], None]


def _position(rng: random.Random, image: bytearray) -> int:
    """Return a position, in the headers more often than not."""
    limit = len(image) if rng.random() < 0.3 else min(len(image), HEADERS_SIZE)
    return rng.randrange(max(limit, 1))


def _truncate(rng: random.Random, image: bytearray) -> None:
    del image[_position(rng, image) :]


def _flip(rng: random.Random, image: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        image[_position(rng, image)] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, image: bytearray) -> None:
    size = rng.choice((1, 2, 4, 8))
    at = _position(rng, image) & -size
    value = rng.choice(EXTREMES) if rng.random() < 0.7 else rng.getrandbits(64)
    image[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _nudge(rng: random.Random, image: bytearray) -> None:
    """Add a little to a word, which changes a pointer or a count."""
    size = rng.choice((2, 4, 8))
    at = _position(rng, image) & -size
    word = int.from_bytes(image[at : at + size], "little") + rng.randrange(-16, 17)
    image[at : at + size] = (word & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _field(rng: random.Random, image: bytearray) -> None:
    """Set a header field of a bzImage, in any kind of image."""
    at, form = rng.choice(list(BZIMAGE_FIELDS.values()))
    size = {"B": 1, "H": 2, "I": 4, "Q": 8}[form[-1]]
    image[at : at + size] = (rng.choice(EXTREMES) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _repeat(rng: random.Random, image: bytearray) -> None:
    start, size = _position(rng, image), rng.choice((4, 8, 56, 64, 512))
    at = _position(rng, image)
    image[at:at] = image[start : start + size]


def _remove(rng: random.Random, image: bytearray) -> None:
    start = _position(rng, image)
    del image[start : start + rng.choice((1, 4, 8, 64, 512))]


CHANGES: tuple[Change, ...] = (_truncate, _flip, _overwrite, _nudge, _field, _repeat, _remove)


def _corrupt(rng: random.Random, image: bytes) -> bytes:
    changed = bytearray(image)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if changed:
            rng.choice(CHANGES)(rng, changed)
    return bytes(changed)


def _attempt(path: Path, data: bytes, config: BootConfig) -> str | None:
    """Open and load; return the error's text, or None if there was none."""
    path.write_bytes(data)
    with GuestMemory(ram_ranges(32 * MIB)) as memory:
        try:
            load(open_image(str(path)), memory, config)
        except BootError as err:
            return str(err)
    return None


@pytest.mark.parametrize("name", IMAGES)
def test_whole_images_load(name: str, tmp_path: Path) -> None:
    """The images that the campaign starts from are valid."""
    assert _attempt(tmp_path / "image", IMAGES[name], BootConfig(cache_directory=None)) is None


@pytest.mark.parametrize("name", IMAGES)
def test_corruptions(name: str, tmp_path: Path) -> None:
    """Every corruption ends in a loaded image or in one line that names the file, in time."""
    rng = random.Random(f"{SEED} {name}")
    path = tmp_path / "image"
    config = BootConfig(cache_directory=None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for number in range(COUNT):
        data = _corrupt(rng, IMAGES[name])
        start = time.process_time()
        error = _attempt(path, data, config)
        assert time.process_time() - start < SECONDS_MAX, number
        if error is not None:
            refused += 1
            assert (len(error.splitlines()), error.startswith(f"{path}: ")) == (1, True), error
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 512 * MIB
    print(f"{name}: {COUNT} corruptions, {refused} refused, {COUNT - refused} loaded")


@pytest.mark.parametrize("value", EXTREMES)
@pytest.mark.parametrize("name", BZIMAGE_FIELDS)
def test_extreme_fields(name: str, value: int, tmp_path: Path) -> None:
    """Each header field of a bzImage set to each extreme value: it loads, or is one line."""
    form = BZIMAGE_FIELDS[name][1]
    size = {"B": 1, "H": 2, "I": 4, "Q": 8}[form[-1]]
    image = BzImage(PACKERS["LZ4"](vmlinux())).but(**{name: value & ((1 << 8 * size) - 1)})
    error = _attempt(tmp_path / "image", image.build(), BootConfig(cache_directory=None))
    assert len((error or "").splitlines()) <= 1


@pytest.mark.parametrize("name", ["vmlinux", "pvh", "multiboot-elf32", "openbsd-amd64"])
def test_every_byte_of_the_headers(name: str, tmp_path: Path) -> None:
    """Each byte of the ELF and program headers set to 0xff: it loads, or is one line."""
    for at in range(64 + 3 * 56):
        data = bytearray(IMAGES[name])
        data[at] = 0xFF
        error = _attempt(tmp_path / "image", bytes(data), BootConfig(cache_directory=None))
        assert len((error or "").splitlines()) <= 1, at
