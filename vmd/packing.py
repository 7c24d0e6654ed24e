"""Memory of a process that others are forked from: what they will write to, in few pages.

A process that is forked shares each page with the one that forked it until either writes to it, and
an interpreter writes to whatever it uses: reference counts, and counters inside of code. What is
used lies scattered among what is not. So functions that are known to run, their code and its names
are copied to where they lie together; and what is free between objects that stay is given away, so
that new objects do not go there, one to a page, but side by side into pages of their own.

Nothing here changes what a program does, and a guess that is wrong costs some memory. For a process
with one thread.

Source: CPython Objects/obmalloc.c; malloc(3), mallinfo(3)
"""

import ctypes
import gc
import sys
import threading
from collections.abc import Iterable, Mapping
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Self

_POOL_SIZE = 16384  # of the interpreter's own allocator, for small objects of one size
_ALIGNMENT = 16
_SMALL_MAX = 512  # larger objects come from the C library
_RUN_SPACING = 4  # blocks between one block of a fresh pool and the next, if others take some
_LARGE_MAX = 1 << 16
_CACHED_MAX = 1040  # the C library keeps up to seven freed blocks of each size up to here
_CACHED_COUNT = 7
_LEFT_MIN = 256  # bytes; smaller holes are left

_python = ctypes.pythonapi
_python.PyObject_Malloc.restype = ctypes.c_void_p
_python.PyObject_Malloc.argtypes = [ctypes.c_size_t]
_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.restype = None
_libc.free.argtypes = [ctypes.c_void_p]


class _Mallinfo2(ctypes.Structure):
    """struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


class Recorder:
    """Notes which code runs, in all threads; a context manager."""

    def __init__(self) -> None:
        """Note nothing yet."""
        self.code: dict[int, CodeType] = {}
        """What ran, by its id."""

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

    def _note(self, frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            self.code[id(frame.f_code)] = frame.f_code


def gather_functions(recorder: Recorder) -> None:
    """Replace functions that ran, and their code, by copies that lie together.

    What runs now goes on in the original, and so does what is called by way of another object than
    a module or a class. The copies have to become quick again, by running.
    """
    gc.unfreeze()  # objects that are frozen are not listed
    everything = gc.get_objects()
    functions = [
        one for one in everything if type(one) is FunctionType and id(one.__code__) in recorder.code
    ]
    # One kind after the other, and first what is needed for a moment only, or seldom.
    for code in recorder.code.values():
        code.co_code  # noqa: B018 - code keeps what this returns
    for function in functions:
        function.__annotations__, function.__dict__  # noqa: B018 - likewise
    names: dict[str, str] = {}
    for code in recorder.code.values():
        for name in (code.co_name, code.co_qualname):
            if name not in names:
                names[name] = name.encode().decode()
    copies: dict[int, CodeType] = {}

    def copy(code: CodeType) -> CodeType:
        if id(code) not in copies:
            constants = tuple(
                copy(value) if isinstance(value, CodeType) and id(value) in recorder.code else value
                for value in code.co_consts
            )
            copies[id(code)] = code.replace(
                co_consts=constants,
                co_name=names[code.co_name],
                co_qualname=names[code.co_qualname],
            )
        return copies[id(code)]

    for function in functions:
        function.__code__ = copy(function.__code__)
    replaced = {id(one): _copy_of(one) for one in functions}
    for one in everything:
        if type(one) is ModuleType or isinstance(one, type):
            _replace_functions(one, replaced)
    recorder.code.clear()


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
    """Give a module or a class the copies of its functions, which are by the originals' id."""

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
        return value

    for name, value in tuple(vars(owner).items()):
        new = copy(value)
        if new is not value:
            setattr(owner, name, new)


def fill_holes() -> None:
    """Take what is free between objects, for ever."""
    gc.collect()
    for size in range(_ALIGNMENT, _SMALL_MAX + 1, _ALIGNMENT):
        _fill_pools(size)
    _fill_heap()


def _fill_pools(size: int) -> None:
    """Take blocks of `size` bytes until they come one behind the other, from a pool that is new."""
    run = last = 0
    while run < _POOL_SIZE // size // 2:
        address: int = _python.PyObject_Malloc(size)
        run = run + 1 if last < address <= last + _RUN_SPACING * size else 0
        last = address


def _fill_heap() -> None:
    """Take blocks, large ones first, until the C library has none but at its end."""
    for size in range(_ALIGNMENT, _CACHED_MAX, _ALIGNMENT):
        for _ in range(_CACHED_COUNT):
            _libc.malloc(size)
    size = _LARGE_MAX
    while size >= _LEFT_MIN:
        before = _mallinfo()
        if before.fordblks - before.keepcost < size:
            size = size * 15 // 16
            continue
        block = _libc.malloc(size)
        if _mallinfo().keepcost < before.keepcost:  # no hole is so large
            _libc.free(block)
            size = size * 15 // 16


def _mallinfo() -> _Mallinfo2:
    _libc.mallinfo2.restype = _Mallinfo2
    info: _Mallinfo2 = _libc.mallinfo2()
    return info
