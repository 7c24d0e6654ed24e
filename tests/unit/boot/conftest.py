"""Shared by the tests of boot paths: files to boot, memory to boot them in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmm_kvm.arch.x86.image import BootImage, open_image
from vmm_kvm.arch.x86.layout import ram_ranges
from vmm_kvm.bits import MIB
from vmm_kvm.memory import GuestMemory


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """64 MiB of guest RAM."""
    with GuestMemory(ram_ranges(64 * MIB)) as ram:
        yield ram


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], str]:
    """A function that writes a file and returns its path."""

    def write_file(data: bytes) -> str:
        path = tmp_path / "image"
        path.write_bytes(data)
        return str(path)

    return write_file


@pytest.fixture
def open_bytes(write: Callable[[bytes], str]) -> Callable[[bytes], BootImage]:
    """A function that opens an image from its bytes."""

    def open_written(data: bytes) -> BootImage:
        return open_image(write(data))

    return open_written


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's kernel cache out of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
