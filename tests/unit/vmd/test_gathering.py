"""Code that is known to run, and objects that it writes to, are moved together."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from types import CodeType
from typing import NamedTuple, NoReturn

import pytest

from vmd.zygote.warm.entry import CONSTANT_VERSIONS, GATHERING_VERSIONS
from vmd.zygote.warm.gathering import Recorder, gather

pytestmark = pytest.mark.skipif(
    sys.version_info[:2] not in GATHERING_VERSIONS, reason="nothing is gathered on this version"
)

_WRITES_TUPLES = sys.version_info[:2] in CONSTANT_VERSIONS


def _outer() -> list[int]:
    def add_one(number: int) -> int:
        return number + 1

    return list(map(add_one, range(3)))


def _other() -> int:
    return 7


def _inner_code(code: CodeType) -> CodeType:
    return next(value for value in code.co_consts if isinstance(value, CodeType))


def test_code_that_ran_is_replaced_by_copies() -> None:
    """A function that ran, and functions in it, get another code object of the same effect."""
    before, inner, untouched = _outer.__code__, _inner_code(_outer.__code__), _other.__code__
    with Recorder() as recorder:
        _outer()
    gather(recorder, writes_tuples=_WRITES_TUPLES)
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
        """The value that was set."""
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
    """Functions, methods and properties are replaced, with all their properties unchanged.

    A holder of an original may continue to use it.
    """
    method, static, prop = (vars(_Kind)[name] for name in ("plain", "fixed", "value"))
    method.__dict__["note"] = "kept"
    function, bound = _use, _Kind().plain
    with Recorder() as recorder:
        used = [_use(_Kind()), _use(_Derived())]
    gather(recorder, writes_tuples=_WRITES_TUPLES)
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
    """A function that is added is replaced, and other objects are skipped."""
    before, untouched = _other, _use
    recorder = Recorder()
    recorder.add([_other, _Kind, 7])
    gather(recorder, writes_tuples=_WRITES_TUPLES)
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


def test_code_that_runs_in_a_forked_process_is_recorded() -> None:
    """Code of a child counts, until it says that it ends; its own definitions do not."""

    def live(_fd: int, at_end: Callable[[], None]) -> NoReturn:
        _other()
        exec("def made(): return 1\nmade()", {})
        at_end()
        _outer()
        os._exit(0)

    with Recorder() as recorder:
        recorder.follow(live)
    assert _other.__code__ in recorder.code.values()
    assert _outer.__code__ not in recorder.code.values()
    assert "made" not in {code.co_name for code in recorder.code.values()}


def test_a_forked_process_that_dies_tells_nothing() -> None:
    """If a child dies without a word, only earlier records count."""

    def live(_fd: int, _at_end: Callable[[], None]) -> NoReturn:
        _other()
        os._exit(1)

    with Recorder() as recorder:
        recorder.follow(live)
    assert _other.__code__ not in recorder.code.values()


class _Pair(NamedTuple):
    left_side: int
    right_side: str


class _Below(_Kind):
    pass


def _describe(pair: _Pair, *, a_keyword: str = "yes") -> tuple[object, ...]:
    below = _Below()
    below.an_attribute = pair.left_side  # type: ignore[attr-defined]
    return below.an_attribute + 1000, pair.right_side, a_keyword, b"some bytes"  # type: ignore[attr-defined]


def _call() -> tuple[object, ...]:
    return _describe(_Pair(left_side=100_000, right_side="constant"), a_keyword="another")


@pytest.mark.skipif(
    sys.version_info[:2] not in CONSTANT_VERSIONS, reason="no tuples are written to on this version"
)
def test_names_constants_and_base_classes_are_copied() -> None:
    """They are replaced by equal objects, and all code works as before."""
    names, constants = _describe.__code__.co_names, _describe.__code__.co_consts
    at = names.index("left_side")
    name, mro, getter = names[at], _Below.__mro__, vars(_Pair)["left_side"]
    keywords = _call.__code__.co_consts[-1]
    module = __name__
    with Recorder() as recorder:
        before = _call()
    gather(recorder, writes_tuples=_WRITES_TUPLES)
    code = _describe.__code__
    assert code.co_names[at] == name
    assert code.co_names[at] is not name
    assert code.co_consts == constants
    for value in (1000, b"some bytes"):
        where = constants.index(value)
        assert code.co_consts[where] is not constants[where]
    assert _call.__code__.co_consts[-1] == keywords == ("a_keyword",)
    assert _call.__code__.co_consts[-1] is not keywords
    assert _Below.__mro__ == mro
    assert _Below.__mro__ is not mro
    assert vars(_Pair)["left_side"] is not getter
    assert _describe.__globals__["__name__"] == module
    assert before == (101_000, "constant", "another", b"some bytes")
    assert _call() == before
    for _ in range(100):  # until the interpreter has specialised the code, too
        assert _call() == before


def test_classes_that_cannot_be_changed_stay() -> None:
    """A class that cannot be changed, by its metaclass or implementation, is left alone."""

    class Strict(type):
        def __setattr__(cls, name: str, value: object) -> None:
            raise TypeError(name)

    class Unchanging(metaclass=Strict):
        pass

    mro = Unchanging.__mro__
    gather(Recorder(), writes_tuples=_WRITES_TUPLES)
    assert Unchanging.__mro__ == mro
    assert Unchanging.__mro__ is not mro
    assert Unchanging() is not None


_SIDE_BY_SIDE = """
from vmd.zygote.warm.gathering import Recorder, gather
classes = [type(f"_Made{number}", (), {}) for number in range(4000)]
code = compile("; ".join(f"_Made{number}" for number in range(0, 4000, 100)), "made", "exec")
recorder = Recorder()
recorder.code[id(code)] = code
gather(recorder, writes_tuples=False)
print(len({id(one.__mro__) >> 12 for one in classes[::100]}))
"""


def test_base_classes_of_used_classes_lie_side_by_side() -> None:
    """Once gathered, the base class lists of the classes that running code names are neighbours.

    In a process of its own: in this one earlier tests have left holes for the new lists.
    """
    done = subprocess.run(
        [sys.executable, "-c", _SIDE_BY_SIDE], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 20  # pages, of which the old lists lie on 40


def test_tuples_stay_what_they_are() -> None:
    """By default, code keeps its very names and constants."""
    code = _call.__code__
    with Recorder() as recorder:
        before = _call()
    gather(recorder, writes_tuples=False)
    assert _call.__code__ is not code
    for ours, theirs in zip(code.co_names, _call.__code__.co_names, strict=True):
        assert ours is theirs
    assert _call() == before
