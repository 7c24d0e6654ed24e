"""Copies the objects that forked processes will write to, so that they share few pages.

A forked process shares each page with the one that forked it until either writes to it, and an
interpreter writes to each object that it uses: reference counts, and counters inside of code. Such
objects lie scattered among others that no VM uses. So `gather` copies these, each kind side by
side: functions that are known to run, their code, the names and constants in it, the names of
modules, the lists of base classes that are searched, and the descriptors that read items of named
tuples.

Nothing here changes a program's behaviour; a wrong guess costs some memory. For a process with one
thread, on versions of CPython on which the tests pass; see `entry`. To see which pages a VM writes
to first, and where, run `perf record -e page-faults -c 1 -d -a`.

Source: CPython Python/ceval.c, Objects/object.c and typeobject.c
"""

import ctypes
import dis
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from copy import copy as copy_of
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import NamedTuple, NoReturn, Self, TypeGuard, TypeVar, cast

_T = TypeVar("_T")

# Instructions that look an attribute up by name, because the interpreter has not specialised them.
_BY_NAME = frozenset(
    f"{kind}_ATTR{state}" for kind in ("LOAD", "STORE", "DELETE") for state in ("", "_ADAPTIVE")
) | {"LOAD_METHOD", "LOAD_METHOD_ADAPTIVE"}
_TEXT_MAX = 30  # longer constants are messages, which are seldom needed
_IMMUTABLE_TYPE, _HEAP_TYPE = 1 << 8, 1 << 9  # tp_flags
_BASES = vars(type)["__bases__"]
_ID_SIZE = 8

_python = ctypes.pythonapi
_python.Py_IncRef.restype = _python.Py_DecRef.restype = None
_python.Py_IncRef.argtypes = _python.Py_DecRef.argtypes = [ctypes.py_object]


class _Named(NamedTuple):
    """A tuple with a named item."""

    item: None


_ITEM_GETTER = type(vars(_Named)["item"])

Live = Callable[[int, Callable[[], None]], NoReturn]
"""Plays a process, calls its second argument, for which it keeps the descriptor that is its first,
and exits."""


class Recorder:
    """Records which code runs, in all threads; a context manager."""

    def __init__(self) -> None:
        """Note nothing yet."""
        self.code: dict[int, CodeType] = {}
        """Code that ran, by its id."""

    def __enter__(self) -> Self:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def add(self, functions: Iterable[object]) -> None:
        """Count functions as if they had run; anything else is passed over."""
        for function in functions:
            if isinstance(function, FunctionType):
                self.code[id(function.__code__)] = function.__code__

    def follow(self, live: Live) -> None:
        """Fork a process that runs `live`, and record its code, within the context.

        Raises:
            OSError: the host has no processes or descriptors left.
        """
        read_fd, write_fd = os.pipe()
        with open(read_fd, "rb") as ids, open(write_fd, "wb") as end:  # noqa: PTH123 - descriptors
            pid = os.fork()
            if pid == 0:
                live(end.fileno(), lambda: self._tell(end.fileno()))
            end.close()
            told = ids.read()
        os.waitpid(pid, 0)
        known = {id(code): code for code in _all_code()}
        for at in range(0, len(told), _ID_SIZE):
            code = known.get(int.from_bytes(told[at : at + _ID_SIZE], sys.byteorder))
            if code is not None:  # not code that the child has made
                self.code[id(code)] = code

    def _tell(self, fd: int) -> None:
        for one in tuple(self.code):
            os.write(fd, one.to_bytes(_ID_SIZE, sys.byteorder))

    def _note(self, frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            self.code[id(frame.f_code)] = frame.f_code


def _everything() -> list[object]:
    gc.unfreeze()  # objects that are frozen are not listed
    return gc.get_objects()


def _all_code() -> Iterator[CodeType]:
    """Yield the code of all functions, and of those defined within."""
    for one in _everything():
        if type(one) is FunctionType:
            yield one.__code__
            yield from _inner_code(one.__code__)


def _inner_code(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of functions and classes in `code`, at any depth."""
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield value
            yield from _inner_code(value)


class _Constants:
    """Copies of strings, bytes, numbers and tuples of strings; equal ones have one copy."""

    def __init__(self) -> None:
        """Have none."""
        self._copies: dict[tuple[type, object], object] = {}

    def add(self, value: object) -> None:
        """Copy a value; values of other types are skipped."""
        if (type(value), value) in self._copies:
            return
        copy: object
        match value:
            case str():
                copy = value.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass")
                hash(copy)  # it is kept in the string
            case bytes():
                copy = bytes(bytearray(value))
            case int() if type(value) is int:
                copy = 0 - (0 - value)
            case tuple() if value and all(type(name) is str for name in value):
                for name in value:
                    self.add(name)
                copy = tuple([self.copy(name) for name in value])
            case _:
                return
        self._copies[type(value), value] = copy

    def copy(self, value: _T) -> _T:
        """Return the copy of a value; itself, if there is none."""
        try:
            return cast(_T, self._copies.get((type(value), value), value))
        except TypeError:  # it has no hash
            return value


def gather(recorder: Recorder, *, writes_tuples: bool) -> None:
    """Replace functions that ran, and objects that their running writes to, by copies.

    Names and constants of code are copied only with `writes_tuples`: code holds them in tuples,
    which Python calls immutable.

    Running calls continue in the originals, as do functions reached through objects other than
    modules and classes. The copies must be specialised again, by running. The originals should be
    specialised before, so that it is known which names are still looked up.
    """
    everything = _everything()
    for code in tuple(recorder.code.values()):
        # Defining a function writes to its code.
        recorder.code.update((id(inner), inner) for inner in _inner_code(code))
    functions = [
        one for one in everything if type(one) is FunctionType and id(one.__code__) in recorder.code
    ]
    # Those that first ran at one time lie together: they are needed at one time.
    order = {key: place for place, key in enumerate(recorder.code)}
    functions.sort(key=lambda one: order[id(one.__code__)])
    # One kind after the other, beginning with objects that are needed briefly or seldom.
    for code in recorder.code.values():
        code.co_code  # noqa: B018 - code keeps what this returns
    for function in functions:
        function.__annotations__, function.__dict__  # noqa: B018 - likewise
    names = {name for code in recorder.code.values() for name in code.co_names}
    constants = _Constants()
    if writes_tuples:
        _gather_constants(constants, recorder.code.values(), functions)
    _gather_mros(everything, names)
    copies: dict[int, CodeType] = {}

    def copy(code: CodeType) -> CodeType:
        if id(code) not in copies:
            inner = tuple(
                copy(value) if isinstance(value, CodeType) else value for value in code.co_consts
            )
            made = code.replace(
                co_consts=inner,
                co_name=constants.copy(code.co_name),
                co_qualname=constants.copy(code.co_qualname),
            )
            # Code that is made has all names replaced by those that other code has.
            for items in (made.co_names, made.co_consts) if writes_tuples else ():
                for index, value in enumerate(items):
                    _put(items, index, constants.copy(value))
            copies[id(code)] = made
        return copies[id(code)]

    for function in functions:
        function.__code__ = copy(function.__code__)
    replaced = {id(one): _copy_of(one) for one in functions}
    for one in everything:
        if type(one) is ModuleType or isinstance(one, type):
            _replace_functions(one, replaced)
    recorder.code.clear()


def _gather_constants(
    constants: _Constants, codes: Iterable[CodeType], functions: Iterable[FunctionType]
) -> None:
    """Copy names of attributes that are looked up, constants, and the parts of new functions.

    Modules are named by the copies from now on.
    """
    for code in codes:
        for instruction in dis.get_instructions(code, adaptive=True):
            if instruction.opname in _BY_NAME:
                constants.add(instruction.argval)
        for value in code.co_consts[1:]:  # the first is a description
            if isinstance(value, CodeType):
                for text in (value.co_name, value.co_qualname, *value.co_consts[:1]):
                    constants.add(text)
            elif type(value) is not str or (value.isidentifier() and len(value) < _TEXT_MAX):
                constants.add(value)
    namespaces = {id(one.__globals__): one.__globals__ for one in functions}.values()
    for namespace in namespaces:
        constants.add(namespace["__name__"])
    for namespace in namespaces:
        namespace["__name__"] = constants.copy(namespace["__name__"])


def _gather_mros(everything: Iterable[object], names: AbstractSet[str]) -> None:
    """Give classes new lists of base classes, which each search writes to.

    Those of classes that go by one of `names` come last, side by side.
    """
    mutable = [one for one in everything if _is_mutable(one)]
    kept = [one.__mro__ for one in mutable]  # so that no new list takes the place of an old one
    roots = [one for one in mutable if not any(map(_is_mutable, one.__bases__))]
    used = [one for one in mutable if one.__name__ in names]
    used.sort(key=lambda one: len(one.__mro__))  # a change to a class affects its subclasses
    for one in (*roots, *used):
        kept.append(one.__mro__)
        # This rebuilds them, for the class and its subclasses, with any metaclass.
        _BASES.__set__(one, one.__bases__)
    kept.clear()


def _is_mutable(one: object) -> TypeGuard[type]:
    """Whether it is a class made by a program; proxies of classes do not count."""
    return issubclass(type(one), type) and (
        cast(type, one).__flags__ & (_HEAP_TYPE | _IMMUTABLE_TYPE) == _HEAP_TYPE
    )


def _put(items: tuple[object, ...], index: int, value: object) -> None:
    """Replace an item of a tuple, by one that equals it."""
    old = items[index]
    if old is not value:
        _python.Py_IncRef(value)
        place = id(items) + tuple.__basicsize__ + index * tuple.__itemsize__
        ctypes.c_void_p.from_address(place).value = id(value)
        _python.Py_DecRef(old)


def _copy_of(function: FunctionType) -> FunctionType:
    copy = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = function.__annotations__
    copy.__qualname__ = function.__code__.co_qualname
    copy.__module__ = function.__module__
    copy.__doc__ = function.__doc__
    copy.__dict__ = function.__dict__
    return copy


def _replace_functions(owner: ModuleType | type, copies: Mapping[int, FunctionType]) -> None:
    """Give a module or a class the copies of its functions, by the originals' id."""

    def copy(value: object) -> object:
        if type(value) is FunctionType:
            return copies.get(id(value), value)
        if isinstance(value, staticmethod | classmethod) and id(value.__func__) in copies:
            return type(value)(copies[id(value.__func__)])
        if type(value) is property:
            made = value
            if id(value.fget) in copies:
                made = made.getter(copies[id(value.fget)])
            if id(value.fset) in copies:
                made = made.setter(copies[id(value.fset)])
            if id(value.fdel) in copies:
                made = made.deleter(copies[id(value.fdel)])
            return made
        if type(value) is _ITEM_GETTER:
            return copy_of(value)
        return value

    for name, value in tuple(vars(owner).items()):
        new = copy(value)
        if new is not value:
            setattr(owner, name, new)
