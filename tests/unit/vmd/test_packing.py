"""What is known to run moves together, and free memory between objects is not used again."""

from __future__ import annotations

import gc
import threading
from types import CodeType

from vmd.packing import Recorder, fill_holes, gather_functions


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
    gather_functions(recorder)
    assert _outer.__code__ is not before
    assert _inner_code(_outer.__code__) is not inner
    assert _outer.__code__ == before
    assert _outer() == [1, 2, 3]
    assert _other.__code__ is untouched


class _Kind:
    """Methods of every sort."""

    made = 0

    def plain(self, first: int, second: int = 2, *, third: int = 3) -> int:
        """Add all."""
        return first + second + third

    @staticmethod
    def fixed(number: int) -> int:
        return number + 1

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__

    @property
    def value(self) -> int:
        """What was set."""
        return self.made

    @value.setter
    def value(self, value: int) -> None:
        self.made = value


class _Derived(_Kind):
    def plain(self, first: int, second: int = 20, *, third: int = 30) -> int:
        return super().plain(first, second, third=third)


def _use(kind: _Kind) -> tuple[object, ...]:
    kind.value = 5
    return kind.plain(1), kind.fixed(1), kind.of_class(), kind.value


def test_functions_that_ran_are_replaced_by_copies_that_do_the_same() -> None:
    """Functions, methods and properties are others afterwards, and all that they have is the same.

    What holds on to an original may go on with it.
    """
    method, static, prop = (vars(_Kind)[name] for name in ("plain", "fixed", "value"))
    method.__dict__["note"] = "kept"
    function, bound = _use, _Kind().plain
    with Recorder() as recorder:
        used = [_use(_Kind()), _use(_Derived())]
    gather_functions(recorder)
    copy = vars(_Kind)["plain"]
    assert copy is not method
    assert vars(_Kind)["fixed"] is not static
    assert vars(_Kind)["value"].fget is not prop.fget
    assert vars(_Kind)["value"].fset is not prop.fset
    assert vars(_Kind)["value"].__doc__ == prop.__doc__
    assert _use is not function
    for name in (
        *("__name__", "__qualname__", "__module__", "__doc__", "__dict__"),
        *("__defaults__", "__kwdefaults__", "__annotations__", "__globals__", "__code__"),
    ):
        assert getattr(copy, name) == getattr(method, name), name
    assert used == [(6, 2, "_Kind", 5), (51, 2, "_Derived", 5)]
    assert [_use(_Kind()), _use(_Derived())] == used
    assert bound(1) == 6


def test_functions_that_are_known_to_run_count_as_those_that_ran() -> None:
    """A function that is added is replaced, and what is no function is passed over."""
    before, untouched = _other, _use
    recorder = Recorder()
    recorder.add([_other, _Kind, 7])
    gather_functions(recorder)
    assert _other is not before
    assert _use is untouched
    assert _other() == 7


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
