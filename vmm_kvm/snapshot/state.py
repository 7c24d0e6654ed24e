"""The state of devices and vCPUs as bytes: an index in JSON, then KVM's structures as they are.

    u32 size of the index | index | bytes of the first blob | of the second | ...

The index is `{"parts": {name: ...}, "blobs": [[name, size], ...]}`.
"""

import struct
from collections.abc import Mapping
from typing import NamedTuple

from vmm_kvm.errors import SnapshotError
from vmm_kvm.snapshot.manifest import STATE_MAX
from vmm_kvm.snapshot.objects import Object, dump, parse
from vmm_kvm.state import Json

_SIZE = struct.Struct("<I")
_BLOBS_MAX = 1 << 14
_NAME_MAX = 255


class State(NamedTuple):
    """What devices and vCPUs hold."""

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


def decode(data: bytes) -> State:
    """Return the state that bytes describe; what is in it is not looked at.

    Raises:
        SnapshotError: they describe none.
    """
    if len(data) < _SIZE.size:
        raise SnapshotError("state: cut short")
    start = _SIZE.size + int(_SIZE.unpack_from(data)[0])
    if start > len(data):
        raise SnapshotError("state: cut short")
    blobs: dict[str, bytes] = {}
    with Object(parse(data[_SIZE.size : start], "state"), "state") as index:
        found = index.take("parts")
        if not isinstance(found, dict):
            raise SnapshotError("state: parts: not an object")
        parts = {name: part for name, part in found.items() if isinstance(part, dict)}
        if len(parts) != len(found):
            raise SnapshotError("state: parts: one is not an object")
        for one in index.items("blobs", _BLOBS_MAX):
            if not isinstance(one, list) or len(one) != 2:
                raise SnapshotError("state: blobs: not a name and a size")
            name, size = one
            if not isinstance(name, str) or len(name) > _NAME_MAX or name in blobs:
                raise SnapshotError("state: blobs: a name that is none, or is there twice")
            if type(size) is not int or not 0 <= size <= len(data) - start:
                raise SnapshotError(f"state: blob {name!r}: cut short")
            blobs[name] = data[start : start + size]
            start += size
    if start != len(data):
        raise SnapshotError("state: bytes behind the last blob")
    return State(parts, blobs)
