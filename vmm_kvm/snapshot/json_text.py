"""The JSON of snapshots: written in one way, and read strictly, from any writer.

`vmm_kvm.state` makes records of the values.
"""

import json
from typing import NoReturn

from vmm_kvm.errors import SnapshotError
from vmm_kvm.state import Json

_INT_MAX = 1 << 64


def parse(text: bytes, what: str) -> Json:
    """Return the value of a JSON text.

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
