"""The C library, for calls that Python lacks: loaded once, here, with each function's declaration.

A call that fails leaves its errno for `ctypes.get_errno()`, on the same thread. Functions that no
line here declares take ints, bytes and pointers, and return an int, as ctypes has it by default.
"""

import ctypes
import mmap

from vmm_kvm.bits import PAGE_SIZE

# The mmap module lacks these.
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0
_MREMAP_MAYMOVE, _MREMAP_FIXED, _MREMAP_DONTUNMAP = 1, 2, 4

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC_WITHOUT_ERRNO = ctypes.CDLL(None)
"""For calls whose errno is not read: copying it takes time."""

LIBC.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
LIBC.syscall.restype = ctypes.c_long
LIBC.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
LIBC.unshare.argtypes = (ctypes.c_int,)
LIBC.mount.argtypes = (*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p)
LIBC.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_int64,
)
LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
LIBC.mremap.restype = ctypes.c_void_p
LIBC.mremap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int),
    ctypes.c_void_p,
)
LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
for _function in (LIBC.preadv64, LIBC.pwritev64):
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int64)


def map_over(
    address: int, size: int, fd: int, offset: int = 0, *, is_private: bool = False
) -> None:
    """Map `size` bytes of `fd` from `offset` on over what this process has at `address`.

    All are multiples of 4096. They are shared, or with `is_private` copied page by page as this
    process writes to them. Python mappings that lie there continue as views of it.

    Raises:
        OSError: the descriptor cannot be mapped.

    Source: mmap(2), MAP_FIXED.
    """
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags = _MAP_FIXED | (mmap.MAP_PRIVATE if is_private else mmap.MAP_SHARED)
    if LIBC.mmap(address, size, protection, flags, fd, offset) != address:
        raise OSError(ctypes.get_errno(), "mmap")


def reserve(size: int) -> int:
    """Return the address of `size` bytes that nothing else of this process gets, until `unmap`.

    Raises:
        OSError: there is no room.

    Source: mmap(2).
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    address: int | None = LIBC.mmap(None, size, _PROT_NONE, flags, -1, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    return address


def move_pages(address: int, size: int, target: int) -> None:
    """Move the pages of one mapping of this process, or a part of it, to another address.

    The mapping stays as it is, but without pages: what is read there next is zeros, or what its
    file has. What was at `target` is gone. Quick if both are the same modulo 2 MiB.

    Raises:
        OSError: it is not all one mapping, or the kernel is older than 5.13.

    Source: mremap(2), MREMAP_DONTUNMAP.
    """
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
    if LIBC.mremap(address, size, size, flags, target) != target:
        raise OSError(ctypes.get_errno(), "mremap")


def unmap(address: int, size: int) -> None:
    """Give back all that this process has mapped in a range.

    Raises:
        OSError: the kernel does not take it.

    Source: munmap(2).
    """
    if LIBC.munmap(address, size):
        raise OSError(ctypes.get_errno(), "munmap")


def madvise(address: int, size: int, advice: int) -> None:
    """Advise about `size` bytes of this process's memory at `address`, a multiple of 4096.

    Raises:
        OSError: the kernel does not take it, or not all of it is mapped (ENOMEM).

    Source: madvise(2).
    """
    if LIBC.madvise(address, size, advice):
        raise OSError(ctypes.get_errno(), "madvise")


def mincore(address: int, size: int) -> bytes:
    """Return a byte for each page of this process's memory: bit 0 tells whether it is in RAM.

    `address` is a multiple of 4096; `size`, in bytes, too.

    Raises:
        OSError: not all of it is mapped (ENOMEM), or `address` is no multiple.

    Source: mincore(2).
    """
    pages = ctypes.create_string_buffer(size // PAGE_SIZE)
    if LIBC.mincore(address, size, pages):
        raise OSError(ctypes.get_errno(), "mincore")
    return pages.raw
