"""Code that is known to run moves together, and free memory between objects is not used again."""

from __future__ import annotations

import gc
import threading
from types import CodeType

from vmd.packing import Recorder, fill_holes, gather_code


def _outer() -> list[int]:
    return [number + 1 for number in range(3)]


def _other() -> int:
    return 7


def _inner_code(code: CodeType) -> CodeType:
    return next(value for value in code.co_consts if isinstance(value, CodeType))


def test_code_that_ran_is_replaced_by_copies() -> None:
    """A function that ran, and what is defined in it, has other code that does the same."""
    before, inner, untouched = _outer.__code__, _inner_code(_outer.__code__), _other.__code__
    with Recorder() as recorder:
        _outer()
    gather_code(recorder)
    assert _outer.__code__ is not before
    assert _inner_code(_outer.__code__) is not inner
    assert _outer.__code__ == before
    assert _outer() == [1, 2, 3]
    assert _other.__code__ is untouched


def test_threads_are_recorded() -> None:
    """Code that runs in a thread counts as code that runs."""
    with Recorder() as recorder:
        thread = threading.Thread(target=_other)
        thread.start()
        thread.join()
    assert _other.__code__ in recorder.code.values()


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
