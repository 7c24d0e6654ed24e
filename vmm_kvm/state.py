"""The state of parts of a machine: records that leave the process, and how they become JSON.

A part that a guest can tell from another one is `Stateful`: `save` returns a record, a `PartState`,
and `restore` continues from one. Other records, such as a snapshot's manifest, are NamedTuples.
The types of a record's fields are the whole of its format: `encode` makes JSON of a record, and
`decode` a record of JSON that may come from anywhere; it refuses what has another type, is out of
range, is missing, or is not known. `restore` checks what only the part can judge. Each record has a
field `version`, which changes when the meaning of another field does.

Fields are bool, int with a `Range`, str with a `Line` or a `Length`, bytes with a `Length`, a
member of an IntEnum, a Literal, a record, None beside one of them, or a tuple or frozenset of them.
Bytes are hexadecimal digits in JSON; those of type `Blob` are left out of it and stay bytes.
"""

import enum
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import (
    Annotated,
    Literal,
    Protocol,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from vmm_kvm.errors import StateError
from vmm_kvm.record import Record

Json: TypeAlias = "bool | int | str | list[Json] | dict[str, Json] | None"


class PartState(Record):
    """The state of a part: every machine that starts defines two dozen, and few make one."""


AnyRecord = PartState | tuple[object, ...]
S = TypeVar("S", bound=AnyRecord)
T = TypeVar("T", bound=AnyRecord)


class _Limits:
    """A least and a largest value, both included."""

    __slots__ = ("high", "low")

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high


class Range(_Limits):
    """The least and the largest value of an int."""

    __slots__ = ()


class Length(_Limits):
    """The least and the largest length of text, bytes or a tuple."""

    __slots__ = ()


class Line(_Limits):
    """The least and the largest length of text without control characters."""

    __slots__ = ()


class _Raw:
    """Bytes that stay bytes."""

    __slots__ = ()


U8 = Annotated[int, Range(0, 0xFF)]
U16 = Annotated[int, Range(0, 0xFFFF)]
U32 = Annotated[int, Range(0, 0xFFFF_FFFF)]
U64 = Annotated[int, Range(0, 0xFFFF_FFFF_FFFF_FFFF)]
S64 = Annotated[int, Range(-(1 << 63), (1 << 63) - 1)]
Blob = Annotated[bytes, _Raw()]
"""Bytes that are too many for JSON, or a structure of the kernel's."""


class Stateful(Protocol[S]):
    """A part with a state that a guest can observe; `S` is a PartState."""

    def save(self) -> S:
        """Return the state; while the machine is paused."""

    def restore(self, state: S) -> None:
        """Continue from a state of a part of the same make, before the guest runs.

        Raises:
            StateError: it cannot be a state of this part.
        """


class Part:
    """A part under the name that its state has in the state of its machine."""

    __slots__ = ("_restore", "_save", "device", "name")

    def __init__(self, name: str, device: Stateful[S]) -> None:
        """Name `device`; the annotation of its `save` says what kind of record it has."""
        self.name = name
        self.device: object = device
        kind = record_type(device)

        def restore(fields: object, blobs: Mapping[str, bytes]) -> None:
            device.restore(decode(kind, fields, blobs))

        self._save: Callable[[], AnyRecord] = device.save
        self._restore = restore

    def save(self) -> "tuple[dict[str, Json], dict[str, bytes]]":
        """Return the state for JSON, and its blobs by their fields' names."""
        return encode(self._save())

    def restore(self, fields: object, blobs: Mapping[str, bytes]) -> None:
        """Continue from what `save` returned, which may come from anywhere.

        Raises:
            StateError: it is no state of this part.
        """
        try:
            self._restore(fields, blobs)
        except StateError as err:
            raise StateError(f"{self.name}: {err}") from err


_known_kinds: dict[type, type] = {}


def record_type(device: Stateful[S]) -> type[S]:
    """Return the type of the record that `save` returns."""
    owner = type(device)
    kind: type[S] | None = _known_kinds.get(owner)
    if kind is None:
        kind = _known_kinds[owner] = get_type_hints(owner.save)["return"]
    return kind


def encode(record: AnyRecord) -> "tuple[dict[str, Json], dict[str, bytes]]":
    """Return `record` as JSON has it, and its blobs by the names of their fields."""
    fields: dict[str, Json] = {}
    blobs: dict[str, bytes] = {}
    for name, hint in _fields(type(record)).items():
        value = getattr(record, name)
        if hint is Blob:
            blobs[name] = value
        else:
            fields[name] = _to_json(value)
    return fields, blobs


def decode(kind: type[T], fields: object, blobs: Mapping[str, bytes] | None = None) -> T:
    """Return the record of type `kind` of what `encode` returned, or of anything else.

    Raises:
        StateError: it is no such record.
    """
    return _decode_record(kind, fields, blobs or {}, "")


_known_fields: dict[type, dict[str, object]] = {}


def _fields(kind: type) -> dict[str, object]:
    if kind not in _known_fields:
        _known_fields[kind] = get_type_hints(kind, include_extras=True)
    return _known_fields[kind]


def _to_json(value: object) -> Json:
    match value:
        case None | bool() | str():
            return value
        case int():
            return int(value)
        case bytes():
            return value.hex()
        case frozenset():
            return [_to_json(item) for item in sorted(value)]
        case PartState():
            return encode(value)[0]
        case tuple() if hasattr(value, "_fields"):
            return encode(value)[0]
        case tuple():
            return [_to_json(item) for item in value]
    raise TypeError(f"{type(value).__name__} in a state")


def _decode_record(kind: type[T], fields: object, blobs: Mapping[str, bytes], name: str) -> T:
    hints = _fields(kind)
    if not isinstance(fields, dict):
        raise StateError(f"{name}no object")
    wanted = {field for field, hint in hints.items() if hint is not Blob}
    if fields.keys() != wanted:
        odd = min(map(str, fields.keys() ^ wanted))
        raise StateError(f"{name}{odd!r:.64} is {'missing' if odd in wanted else 'not known'}")
    if blobs.keys() != hints.keys() - wanted:
        odd = min(blobs.keys() ^ (hints.keys() - wanted))
        raise StateError(f"{name}blob {odd!r:.64} is missing or not known")
    values = {
        field: blobs[field] if hint is Blob else _decode(hint, fields[field], f"{name}{field}: ")
        for field, hint in hints.items()
    }
    return kind(**values)


def _decode(hint: object, value: object, name: str) -> object:
    limits: tuple[object, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        limits = tuple(rest)
    if isinstance(value, list):  # before its items cost anything
        for limit in limits:
            _check_length(limit, value, name)
    found = _decode_plain(hint, value, name)
    for limit in limits:
        if isinstance(limit, Range):
            assert isinstance(found, int), "an int has a range"
            if not limit.low <= found <= limit.high:
                raise StateError(f"{name}{found} is not {limit.low} to {limit.high}")
        elif isinstance(limit, Line):
            assert isinstance(found, str), "text is a line"
            if not limit.low <= len(found) <= limit.high or not found.isprintable():
                raise StateError(f"{name}not a line of {limit.low} to {limit.high} characters")
        else:
            assert isinstance(found, Sized), "it has a length"
            _check_length(limit, found, name)
    return found


def _check_length(limit: object, value: Sized, name: str) -> None:
    if isinstance(limit, Length) and not limit.low <= len(value) <= limit.high:
        raise StateError(f"{name}{len(value)} long, not {limit.low} to {limit.high}")


def _decode_plain(hint: object, value: object, name: str) -> object:
    if hint is bool or hint is int or hint is str:
        if type(value) is not hint:
            raise StateError(f"{name}not of type {hint.__name__}")
        return value
    if hint is bytes:
        return _bytes(value, name)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if type(value) not in {int, str} or value not in arguments:
            raise StateError(f"{name}not {' or '.join(map(str, arguments))}")
        return value
    if origin in {Union, types.UnionType}:
        if value is None:
            return None
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return _decode(inner, value, name)
    if origin is tuple or origin is frozenset:
        return _decode_items(origin, arguments, value, name)
    assert isinstance(hint, type), f"a field of type {hint}"
    if issubclass(hint, enum.IntEnum):
        if type(value) is not int or value not in {int(member) for member in hint}:
            raise StateError(f"{name}no such {hint.__name__}")
        return hint(value)
    assert issubclass(hint, PartState | tuple), f"a field of type {hint}"
    return _decode_record(hint, value, {}, name)


def _decode_items(
    origin: type, arguments: tuple[object, ...], value: object, name: str
) -> tuple[object, ...] | frozenset[object]:
    if not isinstance(value, list):
        raise StateError(f"{name}no list")
    hints: Iterable[object]
    if origin is frozenset or arguments[-1] is Ellipsis:
        hints = (arguments[0] for _ in value)
    elif len(value) != len(arguments):
        raise StateError(f"{name}{len(value)} long, not {len(arguments)}")
    else:
        hints = arguments
    items: Iterator[object] = (
        _decode(hint, item, f"{name}{number}: ")
        for number, (hint, item) in enumerate(zip(hints, value, strict=True))
    )
    return frozenset(items) if origin is frozenset else tuple(items)


def _bytes(value: object, name: str) -> bytes:
    if isinstance(value, str):
        try:
            data = bytes.fromhex(value)
        except ValueError:
            data = None
        if data is not None and 2 * len(data) == len(value):
            return data
    raise StateError(f"{name}no hexadecimal digits")
