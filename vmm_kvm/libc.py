"""The C library, for calls that Python lacks: loaded once, here, with each function's declaration.

A call that fails leaves its errno for `ctypes.get_errno()`, on the same thread. Functions that no
line here declares take ints, bytes and pointers, and return an int, as ctypes has it by default.
"""

import ctypes
import mmap

from vmm_kvm.bits import PAGE_SIZE

_MAP_FIXED = 0x10  # the mmap module lacks it

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
