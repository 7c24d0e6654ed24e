"""Room for the new objects of forked processes.

Free blocks between lasting objects are used up, so that new objects go side by side into pages of
their own, instead of one each to pages that would have to be copied.

Nothing here changes a program's behaviour; a wrong guess costs some memory. For a process
with one thread.

Source: CPython Objects/obmalloc.c; malloc(3), mallinfo(3)
"""

import ctypes
import gc

from vmm_kvm.libc import LIBC_WITHOUT_ERRNO

_POOL_SIZE = 16384  # of the interpreter's own allocator, for small objects of one size
_ALIGNMENT = 16
_SMALL_MAX = 512  # larger objects come from the C library
_RUN_SPACING = 4  # blocks between one block of a fresh pool and the next, if others take some
_LARGE_MAX = 1 << 16
_CACHED_MAX = 1040  # the C library keeps up to seven freed blocks of each size up to here
_CACHED_COUNT = 7
_LEFT_MIN = 24  # bytes; the C library has no smaller blocks
_TAKEN_MAX = 4 << 20  # bytes of all blocks of one size; an allocator of another kind has no pools
_HEAP_STEPS_MAX = 100_000

_python = ctypes.pythonapi
_python.PyObject_Malloc.restype = ctypes.c_void_p
_python.PyObject_Malloc.argtypes = [ctypes.c_size_t]
LIBC_WITHOUT_ERRNO.malloc.restype = ctypes.c_void_p
LIBC_WITHOUT_ERRNO.malloc.argtypes = [ctypes.c_size_t]
LIBC_WITHOUT_ERRNO.free.restype = None
LIBC_WITHOUT_ERRNO.free.argtypes = [ctypes.c_void_p]


class _Mallinfo2(ctypes.Structure):
    """struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def fill_holes() -> None:
    """Use up free blocks between objects, for ever."""
    gc.collect()
    for size in range(_ALIGNMENT, _SMALL_MAX + 1, _ALIGNMENT):
        _fill_pools(size)
    _fill_heap()


def _fill_pools(size: int) -> None:
    """Take blocks of `size` bytes until the first of a pool that is new.

    A pool counts as new if half of its blocks came in sequence. All others are full then, and the
    next objects lie on the page of the new pool's own header.
    """
    run = last = 0
    for _ in range(_TAKEN_MAX // size):
        address: int = _python.PyObject_Malloc(size)
        is_next = last < address <= last + _RUN_SPACING * size
        if run >= _POOL_SIZE // size // 2 and not (
            is_next and address // _POOL_SIZE == last // _POOL_SIZE
        ):
            return
        run = run + 1 if is_next else 0
        last = address


def _fill_heap() -> None:
    """Take blocks, large ones first, until the C library has none but at its end."""
    for size in range(_ALIGNMENT, _CACHED_MAX, _ALIGNMENT):
        for _ in range(_CACHED_COUNT):
            LIBC_WITHOUT_ERRNO.malloc(size)
    size = _LARGE_MAX
    for _ in range(_HEAP_STEPS_MAX):
        if size < _LEFT_MIN:
            return
        before = _mallinfo()
        if before.fordblks - before.keepcost < size:
            size = size * 15 // 16
            continue
        block = LIBC_WITHOUT_ERRNO.malloc(size)
        if _mallinfo().keepcost < before.keepcost:  # no hole is so large
            LIBC_WITHOUT_ERRNO.free(block)
            size = size * 15 // 16


def _mallinfo() -> _Mallinfo2:
    LIBC_WITHOUT_ERRNO.mallinfo2.restype = _Mallinfo2
    info: _Mallinfo2 = LIBC_WITHOUT_ERRNO.mallinfo2()
    return info
