"""Memory with a descriptor: its access rights, and the changes that its seals allow."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable

import pytest

from vmm_kvm.memfd import ALL_SEALS, SIZE_SEALS, make_constant, make_memory, make_scratch


@pytest.mark.parametrize(
    ("make", "seals"),
    [
        (lambda: make_scratch("scratch"), 0),
        (lambda: make_memory("memory", 4096), SIZE_SEALS),
        (lambda: make_constant("constant", (b"a", b"b")), ALL_SEALS),
    ],
)
def test_nobody_else_may_open_it(make: Callable[[], int], seals: int) -> None:
    """The mode is 0600 without execution, and no child inherits the descriptor."""
    fd = make()
    assert os.fstat(fd).st_mode & 0o7777 == 0o600
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & ALL_SEALS == seals
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_memory_keeps_its_size() -> None:
    """Memory can be mapped and written, but not truncated, extended or sealed further."""
    fd = make_memory("memory", 8192)
    with mmap.mmap(fd, 8192) as mapping:
        mapping[4096] = 7
        assert os.pread(fd, 1, 4096) == b"\x07"
        for size in (4096, 12288):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(fd)


def test_a_constant_cannot_be_changed() -> None:
    """A constant keeps its contents, even for a process that opens it anew."""
    fd = make_constant("constant", (b"one ", memoryview(b"two")))
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    for each in (fd, again):
        assert os.pread(each, 100, 0) == b"one two"
        with pytest.raises(PermissionError):
            os.pwrite(each, b"x", 0)
        os.close(each)
