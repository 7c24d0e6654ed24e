"""Makes objects immortal, so that forked processes use them without writing to them.

CPython counts references in each object that is used, but for immortal ones, which it never frees:
from 3.12 on its own constants are. Whatever was there before a fork and is immortal stays on shared
pages until it changes.

One thing is different afterwards: what freeing such an object would have done is never done. For a
process with one thread, on versions of CPython on which the tests pass; see `entry`.

Source: PEP 683; CPython Include/refcount.h
"""

import ctypes
import gc
import sys
from collections.abc import Collection

_IMMORTAL_MIN = 1 << 31
"""Counts from here on, negative as numbers of 32 bits, are those of immortal objects."""
_IMMORTAL = (1 << 32) - 1 if sys.version_info < (3, 14) else 3 << 30
"""The count that the interpreter itself gives them."""


def immortalise() -> None:
    """Make all objects immortal that can be in a cycle, and all that they refer to."""
    gc.collect()
    gc.unfreeze()  # objects that are frozen are not listed
    seen: set[int] = set()
    found: Collection[object] = gc.get_objects()
    while found:
        fresh = [one for one in found if id(one) not in seen]
        seen.update(map(id, fresh))
        for one in fresh:
            count = ctypes.c_uint32.from_address(id(one))
            if count.value < _IMMORTAL_MIN:
                count.value = _IMMORTAL
        found = gc.get_referents(*fresh)
