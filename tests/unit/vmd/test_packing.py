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
    """New objects go into few pages, instead of one by one into holes between others."""
    objects = [bytes(150) for _ in range(40_000)]
    del objects[::40]
    gc.collect()
    assert _pages_of_new_objects() > 60
    fill_holes()
    assert _pages_of_new_objects() < 20


def test_the_next_object_lies_on_the_page_of_its_pool_s_header() -> None:
    """The interpreter writes to both, so that one page has to be copied instead of two."""
    program = (
        "from vmd.zygote.warm.packing import fill_holes; fill_holes()\n"
        "addresses = [id(bytes(size)) & 16383 for size in range(100, 400, 16)]\n"
        "raise SystemExit(max(addresses) >= 4096)"
    )
    environ = {**os.environ, "PYTHONMALLOC": "pymalloc"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environ, timeout=60)


def test_small_blocks_of_the_c_library_lie_side_by_side() -> None:
    """A lock's few bytes do not go into a hole of just that size."""
    program = (
        "from vmd.zygote.warm.packing import fill_holes\n"
        "from vmm_kvm.libc import LIBC_WITHOUT_ERRNO as libc\n"
        "blocks = [libc.malloc(40) for _ in range(20_000)]\n"
        "for block in blocks[::40]: libc.free(block)\n"
        "fill_holes()\n"
        "pages = {libc.malloc(40) >> 12 for _ in range(100)}\n"
        "raise SystemExit(len(pages) > 10)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_it_ends_without_pools() -> None:
    """With the C library's allocator, which has no pools to fill, packing ends all the same."""
    program = "from vmd.zygote.warm.packing import fill_holes; fill_holes()"
    environ = {**os.environ, "PYTHONMALLOC": "malloc"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environ, timeout=60)
