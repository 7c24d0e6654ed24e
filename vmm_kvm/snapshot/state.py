"""The state of devices and vCPUs as bytes: an index in JSON, then KVM's structures as they are.

    u32 size of the index | index | bytes of the first blob | of the second | ...

The index is `{"parts": {name: ...}, "blobs": [[name, size], ...]}`.
"""

import struct
from collections.abc import Mapping
from typing import Annotated, NamedTuple

from vmm_kvm.errors import SnapshotError, StateError
from vmm_kvm.snapshot.json_text import dump, parse
from vmm_kvm.snapshot.manifest import STATE_MAX
from vmm_kvm.state import Json, Length, Line, Range
from vmm_kvm.state import decode as decode_record

_SIZE = struct.Struct("<I")
_BLOBS_MAX = 1 << 14
_Blob = tuple[Annotated[str, Line(0, 255)], Annotated[int, Range(0, STATE_MAX)]]


class _Index(NamedTuple):
    """The index without the parts, whose fields their devices know."""

    blobs: Annotated[tuple[_Blob, ...], Length(0, _BLOBS_MAX)]


class State(NamedTuple):
    """The state of devices and vCPUs."""

    parts: Mapping[str, dict[str, Json]]
    blobs: Mapping[str, bytes]


def encode(state: State) -> bytes:
    """Return the bytes that `decode` reads.

    Raises:
        SnapshotError: it is too large, or not what JSON can say.
    """
    try:
        index = dump(
            {
                "parts": dict(state.parts),
                "blobs": [[name, len(blob)] for name, blob in state.blobs.items()],
            }
        )
    except (TypeError, ValueError) as err:
        raise SnapshotError(f"state: {err}") from err
    data = b"".join((_SIZE.pack(len(index)), index, *state.blobs.values()))
    if len(data) > STATE_MAX:
        raise SnapshotError(f"state: {len(data)} bytes, at most {STATE_MAX} are possible")
    return data


def decode(data: bytes | memoryview) -> State:
    """Return the state that bytes describe; the fields of its parts are not checked.

    Raises:
        SnapshotError: they describe none.
    """
    if len(data) < _SIZE.size:
        raise SnapshotError("state: cut short")
    start = _SIZE.size + int(_SIZE.unpack_from(data)[0])
    if start > len(data):
        raise SnapshotError("state: cut short")
    blobs: dict[str, bytes] = {}
    parts, listed = _index(bytes(data[_SIZE.size : start]))
    for name, size in listed:
        if name in blobs:
            raise SnapshotError(f"state: blob {name!r} is there twice")
        if size > len(data) - start:
            raise SnapshotError(f"state: blob {name!r}: cut short")
        blobs[name] = bytes(data[start : start + size])
        start += size
    if start != len(data):
        raise SnapshotError("state: bytes behind the last blob")
    return State(parts, blobs)


def _index(text: bytes) -> tuple[dict[str, dict[str, Json]], tuple[_Blob, ...]]:
    index = parse(text, "state")
    if not isinstance(index, dict) or not isinstance(found := index.pop("parts", None), dict):
        raise SnapshotError("state: parts: no object")
    parts = {name: part for name, part in found.items() if isinstance(part, dict)}
    if len(parts) != len(found):
        raise SnapshotError("state: parts: one is no object")
    try:
        return parts, decode_record(_Index, index).blobs
    except StateError as err:
        raise SnapshotError(f"state: {err}") from err
