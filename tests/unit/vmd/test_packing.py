"""Free memory between objects is not used again."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

from vmd.zygote.warm.packing import fill_holes


def _pages_of_new_objects() -> int:
    # More than fit into one pool, which may be nearly empty at any time.
    return len({id(made) >> 12 for made in [bytes(150) for _ in range(200)]})


def test_new_objects_lie_side_by_side() -> None:
    """New objects go into few pages, where they went one by one into holes between others."""
    objects = [bytes(150) for _ in range(40_000)]
    del objects[::40]
    gc.collect()
    assert _pages_of_new_objects() > 60
    fill_holes()
    assert _pages_of_new_objects() < 20


def test_it_ends_without_pools() -> None:
    """With the allocator of the C library, which has no pools to fill, it ends all the same."""
    program = "from vmd.zygote.warm.packing import fill_holes; fill_holes()"
    environ = {**os.environ, "PYTHONMALLOC": "malloc"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environ, timeout=60)
