"""Images of distributions, if this machine has them; nothing is downloaded here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmm_kvm.arch.x86.image import BootConfig, FirmwareImage, LinuxImage, load, open_image
from vmm_kvm.arch.x86.layout import ram_ranges
from vmm_kvm.bits import MIB
from vmm_kvm.memory import GuestMemory


def _kernels() -> list[str]:
    cache = os.environ.get("VMM_CACHE") or str(Path.home() / ".cache" / "vmm-kvm-tests")
    found = (
        *Path(cache).glob("kernels/*/boot/vmlinuz-*"),
        *Path("/boot").glob("vmlinuz-*"),
    )
    return sorted(str(path) for path in found)


def _load(path: str, config: BootConfig) -> tuple[int, bytes]:
    image = open_image(path)
    assert isinstance(image, LinuxImage)
    with GuestMemory(ram_ranges(256 * MIB)) as memory:
        entry = load(image, memory, config)
        return entry.rip, memory.read(entry.rip, 4 * MIB)


@pytest.mark.parametrize(
    "path",
    _kernels()
    or [pytest.param("", marks=pytest.mark.skip("no distribution kernel; see tests/artifacts.py"))],
)
def test_distribution_kernels(path: str) -> None:
    """A kernel is unpacked, found in the cache again, and loads unpacked and packed."""
    image = open_image(path)
    assert isinstance(image, LinuxImage)
    start = image.header.load_address
    unpacked, code = _load(path, BootConfig())
    cached, same_code = _load(path, BootConfig())
    packed, _ = _load(path, BootConfig(unpack=False))
    assert (start + 0x200, True) == (packed, start <= unpacked < start + image.header.init_size)
    assert (unpacked, code) == (cached, same_code)


@pytest.mark.parametrize("name", ["x64", "ia32"])
def test_memtest(name: str) -> None:
    """memtest86+ is a bzImage without a payload, for 64 and for 32 bits."""
    paths = [f"/boot/memtest86+{name}.bin", f"/boot/mt86+{name}"]  # Debian 12 and 13; later ones
    path = next((path for path in paths if Path(path).exists()), None)
    if path is None:
        pytest.skip("memtest86+ is not installed")
    entry, code = _load(path, BootConfig(command_line="console=ttyS0,115200"))
    assert (MIB + (0x200 if name == "x64" else 0), True) == (entry, any(code))


@pytest.mark.parametrize("name", ["bios.bin", "bios-256k.bin", "bios-microvm.bin"])
def test_seabios(name: str) -> None:
    """SeaBIOS in all its sizes is firmware."""
    path = f"/usr/share/seabios/{name}"
    if not Path(path).exists():
        pytest.skip("seabios is not installed")
    assert isinstance(open_image(path), FirmwareImage)
