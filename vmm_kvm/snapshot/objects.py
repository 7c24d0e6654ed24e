"""JSON that somebody else wrote, taken apart field by field: what is not expected is refused.

The library reads no other JSON, and depends on nothing but the standard library; hence this small
reader instead of a schema.
"""

import json
from collections.abc import Callable, Sequence
from typing import NoReturn, Self, TypeVar

from vmm_kvm.errors import SnapshotError
from vmm_kvm.state import Json

T = TypeVar("T")

_INT_MAX = 1 << 64


def parse(text: bytes, what: str) -> Json:
    """Return what a JSON text says.

    Raises:
        SnapshotError: it is none, names a field twice, or has a number that is no integer of 64
            bits.
    """
    try:
        value: Json = json.loads(
            text.decode(),
            parse_int=_integer,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
            object_pairs_hook=_unique,
        )
    except (ValueError, RecursionError) as err:
        reason = "too deep" if isinstance(err, RecursionError) else _first_line(err)
        raise SnapshotError(f"{what}: not JSON: {reason}") from err
    return value


def dump(value: Json) -> bytes:
    """Return a value as JSON, in the one way in which this program writes it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _first_line(err: Exception) -> str:
    return str(err).splitlines()[0]


def _integer(text: str) -> int:
    # Conversion takes quadratic time, so long numbers are not even tried.
    value = int(text) if len(text) <= len(str(-_INT_MAX)) else _INT_MAX
    if not -_INT_MAX < value < _INT_MAX:
        raise ValueError("a number of more than 64 bits")
    return value


def _refuse_number(_text: str) -> NoReturn:
    raise ValueError("a number that is no integer")


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field is there twice")
    return found


class Object:
    """A JSON object whose fields are taken one by one; `end` refuses those that are left."""

    def __init__(self, value: Json, what: str) -> None:
        """Look at `value`, which messages call `what`.

        Raises:
            SnapshotError: it is no object.
        """
        if not isinstance(value, dict):
            raise SnapshotError(f"{what}: not an object")
        self._fields = dict(value)
        self._what = what

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is None:
            self.end()

    def end(self) -> None:
        """Refuse fields that nobody has taken.

        Raises:
            SnapshotError: there is one.
        """
        for name in self._fields:
            raise SnapshotError(f"{self._what}: unknown field {name[:64]!r}")

    def forget_rest(self) -> None:
        """Pass over the fields that nobody has taken: a later version has added them."""
        self._fields.clear()

    def take(self, name: str) -> Json:
        """Return a field, whatever it is.

        Raises:
            SnapshotError: it is missing.
        """
        if name not in self._fields:
            raise SnapshotError(f"{self._what}: no field {name!r}")
        return self._fields.pop(name)

    def integer(self, name: str, least: int, most: int) -> int:
        """Return a number from `least` to `most`.

        Raises:
            SnapshotError: it is none.
        """
        return self._integer(name, self.take(name), least, most)

    def _integer(self, name: str, value: Json, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            raise SnapshotError(f"{self._what}: {name}: not a number from {least} to {most}")
        return value

    def flag(self, name: str) -> bool:
        """Return a truth value.

        Raises:
            SnapshotError: it is none.
        """
        value = self.take(name)
        if not isinstance(value, bool):
            raise SnapshotError(f"{self._what}: {name}: neither true nor false")
        return value

    def text(self, name: str, most: int) -> str:
        """Return a text of at most `most` characters, none of them a control character.

        Raises:
            SnapshotError: it is none.
        """
        return self._text(name, self.take(name), most)

    def _text(self, name: str, value: Json, most: int) -> str:
        if not isinstance(value, str) or len(value) > most or not value.isprintable():
            raise SnapshotError(f"{self._what}: {name}: not a text of at most {most} characters")
        return value

    def optional(self, name: str, read: Callable[[str, Json], T]) -> T | None:
        """Return what `read` makes of a field that may be null."""
        value = self.take(name)
        return None if value is None else read(name, value)

    def optional_text(self, name: str, most: int) -> str | None:
        """Return a text as `text` does, or None for null."""
        return self.optional(name, lambda name, value: self._text(name, value, most))

    def optional_integer(self, name: str, least: int, most: int) -> int | None:
        """Return a number as `integer` does, or None for null."""
        return self.optional(name, lambda name, value: self._integer(name, value, least, most))

    def items(self, name: str, most: int) -> list[Json]:
        """Return a list of at most `most` parts.

        Raises:
            SnapshotError: it is none.
        """
        value = self.take(name)
        if not isinstance(value, list) or len(value) > most:
            raise SnapshotError(f"{self._what}: {name}: not a list of at most {most}")
        return value

    def integers(self, name: str, limits: Sequence[int]) -> tuple[int, ...]:
        """Return as many numbers as there are `limits`, each from 0 to its limit.

        Raises:
            SnapshotError: they are not.
        """
        return integers(self.take(name), f"{self._what}: {name}", limits)


def integers(value: Json, what: str, limits: Sequence[int]) -> tuple[int, ...]:
    """Return as many numbers as there are `limits`, each from 0 to its limit.

    Raises:
        SnapshotError: they are not.
    """
    if not isinstance(value, list) or len(value) != len(limits):
        raise SnapshotError(f"{what}: not {len(limits)} numbers")
    found = []
    for one, most in zip(value, limits, strict=True):
        if type(one) is not int or not 0 <= one <= most:
            raise SnapshotError(f"{what}: not a number from 0 to {most}")
        found.append(one)
    return tuple(found)
