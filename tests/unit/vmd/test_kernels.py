"""The store of unpacked kernels: who may add one, and look-ups."""

from __future__ import annotations

import ast
import enum
import fcntl
import heapq
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmd.shared.kernels import KERNELS_MAX, KernelStore, LentKernel
from vmm_kvm.boot.cache import settled_stamp
from vmm_kvm.boot.source import FileSource, Stamp

CONTENTS = b"an unpacked kernel"
VM = 7
# The interpreter's own files: no process writes them while tests run.
LEFT_ALONE = [str(module.__file__) for module in (ast, enum, heapq, json, os, stat)]


@pytest.fixture
def store() -> Iterator[KernelStore]:
    """An empty store."""
    store = KernelStore()
    yield store
    store.close()


@pytest.fixture
def image() -> Iterator[int]:
    """The descriptor of an old file, as a boot image."""
    fd = os.open(LEFT_ALONE[0], os.O_RDONLY)
    yield fd
    os.close(fd)


def _stamp(image: int) -> Stamp:
    return settled_stamp(os.fstat(image))


def _unpacked(image: int, contents: bytes = CONTENTS) -> int:
    """Return the message of a VM process that has unpacked `image`."""
    handed: list[int] = []
    source = FileSource(os.dup(image), "vmlinuz")
    LentKernel(None, handed.append).keep(source, "", [contents[:3], contents[3:]])
    source.close()
    (fd,) = handed
    return fd


def _read(fd: int | None) -> bytes | None:
    if fd is None:
        return None
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def test_a_kernel_is_found_for_the_same_file(store: KernelStore, image: int) -> None:
    """A kernel that a VM process unpacked is lent to the next one, read from its start."""
    assert store.find(_stamp(image)) is None
    store.expect(VM, _stamp(image))
    assert store.keep(VM, _unpacked(image))
    assert _read(store.find(_stamp(image))) == CONTENTS
    assert _read(store.find(_stamp(image))) == CONTENTS


def test_another_file_has_another_kernel(store: KernelStore, image: int) -> None:
    """An unknown boot image has no kernel in the store."""
    store.expect(VM, _stamp(image))
    assert store.keep(VM, _unpacked(image))
    other = os.open(LEFT_ALONE[1], os.O_RDONLY)
    assert store.find(_stamp(other)) is None
    os.close(other)


def test_a_file_that_was_written_just_now_is_not_remembered(
    store: KernelStore, tmp_path: Path
) -> None:
    """A file written just now is not remembered: its time stamps might miss the next change."""
    path = tmp_path / "new"
    path.write_bytes(b"a boot image")
    fd = os.open(path, os.O_RDONLY)
    os.utime(path, ns=(0, time.time_ns() + 10**9))
    store.expect(VM, _stamp(fd))
    assert not store.keep(VM, _unpacked(fd))
    os.close(fd)


def test_what_nobody_expects_is_refused(store: KernelStore, image: int) -> None:
    """A kernel is refused from another VM, a second time, and once the guest runs."""
    assert not store.keep(VM, _unpacked(image))
    store.expect(VM, _stamp(image))
    assert not store.keep(VM + 1, _unpacked(image))
    store.expect_no_more(VM)
    assert not store.keep(VM, _unpacked(image))
    store.expect(VM, _stamp(image))
    assert store.keep(VM, _unpacked(image))
    assert not store.keep(VM, _unpacked(image, b"something else"))
    assert _read(store.find(_stamp(image))) == CONTENTS


def test_memory_that_can_be_changed_is_refused(store: KernelStore, image: int) -> None:
    """Only memory with every seal is kept: no file, and none with a seal too few."""
    for seals in (
        fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
        fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE,
    ):
        fd = os.memfd_create("kernel", os.MFD_ALLOW_SEALING)
        os.write(fd, CONTENTS)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        store.expect(VM, _stamp(image))
        assert not store.keep(VM, fd)
    store.expect(VM, _stamp(image))
    assert not store.keep(VM, os.dup(image))
    assert store.find(_stamp(image)) is None


def test_the_least_recently_used_go_first(store: KernelStore) -> None:
    """The store has a limit; the least recently used kernel goes first."""
    images = [os.open(path, os.O_RDONLY) for path in LEFT_ALONE[: KERNELS_MAX + 1]]
    for number, image in enumerate(images[:-1]):
        store.expect(number, _stamp(image))
        assert store.keep(number, _unpacked(image))
    assert _read(store.find(_stamp(images[0]))) == CONTENTS
    store.expect(VM, _stamp(images[-1]))
    assert store.keep(VM, _unpacked(images[-1]))
    found = [_read(store.find(_stamp(image))) is not None for image in images]
    assert found == [True, False, *[True] * (KERNELS_MAX - 1)]
    for image in images:
        os.close(image)
