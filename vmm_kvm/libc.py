"""The C library's functions that Python lacks: the one place that declares each.

A failed call raises OSError with the name of the call.
"""

import ctypes
import os

from vmm_kvm.bits import PAGE_SIZE

LIBC = ctypes.CDLL(None, use_errno=True)
"""For functions that one module alone calls, and declares."""

_mincore = LIBC.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_mincore.restype = ctypes.c_int


def failed(call: str) -> OSError:
    """Return the error of the call that has just failed on this thread."""
    errno = ctypes.get_errno()
    return OSError(errno, os.strerror(errno), call)


def mincore(address: int, size: int) -> bytes:
    """Return a byte for each page of this process's memory: bit 0 tells whether it is in RAM.

    `address` is a multiple of 4096; `size`, in bytes, too.

    Raises:
        OSError: not all of it is mapped (ENOMEM), or `address` is no multiple.

    Source: mincore(2).
    """
    pages = ctypes.create_string_buffer(size // PAGE_SIZE)
    if _mincore(address, size, pages):
        raise failed("mincore")
    return pages.raw
