"""The control protocol's requests as operations of HTTP, one to one.

`/api/KIND` is the request of that kind: read by GET, its fields in the query, or made by POST, its
fields in a JSON object. Left out are requests that live on descriptors or on their connection, and
the fields that are indices of descriptors: HTTP carries none.
"""

import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

import msgspec

from vmd.wire import messages, parts, transfers
from vmd.wire.messages import AnyAnswer, AnyRequest, ErrorCode, Failed

BODY_MAX = 64 << 10
"""Bytes of a request's JSON object."""
OWN_FIELDS = ("type", "serial", "version")
"""Fields of every request that its path and its connection stand for."""


class Operation(NamedTuple):
    """A request, and how it is made."""

    request: type[AnyRequest]
    is_read: bool
    """By GET."""
    answers: tuple[type[AnyAnswer], ...]
    """Besides `failed`."""

    @property
    def kind(self) -> str:
        """The request's name in the protocol."""
        return str(self.request.__struct_config__.tag)


OPERATIONS = {
    operation.kind: operation
    for operation in (
        Operation(messages.Status, True, (messages.Vms,)),
        Operation(messages.History, True, (messages.Lines,)),
        Operation(messages.Counts, True, (messages.Totals,)),
        Operation(messages.Source, True, (messages.SourceIs,)),
        Operation(transfers.Snapshots, True, (transfers.SnapshotList,)),
        Operation(messages.Start, False, (messages.Started,)),
        Operation(messages.Stop, False, (messages.Done, messages.Terminated)),
        Operation(messages.Wait, False, (messages.Terminated,)),
        Operation(messages.Pause, False, (messages.Done,)),
        Operation(messages.Unpause, False, (messages.Done,)),
        Operation(transfers.Clone, False, (transfers.Cloned,)),
        Operation(transfers.Snapshot, False, (messages.Done,)),
        Operation(transfers.RemoveSnapshot, False, (messages.Done,)),
        Operation(messages.Load, False, (messages.Done,)),
        Operation(messages.Reload, False, (messages.Done,)),
        Operation(messages.Reset, False, (messages.Done,)),
        Operation(messages.Log, False, (messages.Done,)),
    )
}
STREAMS: Mapping[str, type[AnyRequest]] = {
    "console": messages.Console,
    "events": messages.Events,
}
"""Requests that a WebSocket is for."""
LEFT_OUT = ("connect", "debug", "hold", "open-snapshot", "receive", "send")
"""Requests that need a descriptor, are answered by one, or last as long as their connection."""

_STATUS = {
    ErrorCode.EPERM: 403,
    ErrorCode.ENOENT: 404,
    ErrorCode.EINVAL: 400,
    ErrorCode.ENAMETOOLONG: 400,
}
_CONFLICT = 409


class RequestError(ValueError):
    """A request that is none; `str()` is one line."""


def status_of(answer: AnyAnswer) -> int:
    """Return the status of HTTP that goes with an answer."""
    return _STATUS.get(answer.code, _CONFLICT) if isinstance(answer, Failed) else 200


def from_body(operation: Operation, body: bytes) -> AnyRequest:
    """Return the request that a JSON object is.

    Raises:
        RequestError: it is none of this kind.
    """
    try:
        fields = msgspec.json.decode(body or b"{}")
    except UnicodeDecodeError as err:
        raise RequestError("Invalid UTF-8") from err
    except RecursionError as err:
        raise RequestError("Input data is nested too deep") from err
    except msgspec.MsgspecError as err:
        raise RequestError(_line(err)) from err
    if not isinstance(fields, dict):
        raise RequestError("Expected `object`")
    return _request(operation.request, fields, is_strict=True)


def from_query(request: type[AnyRequest], pairs: list[tuple[str, str]]) -> AnyRequest:
    """Return the request that the fields of a query make.

    Raises:
        RequestError: they make none.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise RequestError("a field is given twice")
    return _request(request, fields, is_strict=False)


def _request(
    request: type[AnyRequest], fields: Mapping[str, object], *, is_strict: bool
) -> AnyRequest:
    own = next((name for name in OWN_FIELDS if name in fields), None)
    if own is not None:
        raise RequestError(f"Object contains unknown field `{own}`")
    index = next(_indices_given(request, fields), None)
    if index is not None:
        raise RequestError(f"Object contains a descriptor's index, `{index}`: HTTP carries none")
    try:
        tagged = {"type": request.__struct_config__.tag, **fields}
        return msgspec.convert(tagged, request, strict=is_strict)
    except msgspec.ValidationError as err:
        raise RequestError(_line(err)) from err


def _line(err: Exception) -> str:
    return " ".join(str(err).split())


# Fields that are indices of descriptors


def indices(struct: type[msgspec.Struct]) -> list[str]:
    """Return the fields of a message, or of a part of one, that are indices of descriptors."""
    hints = typing.get_type_hints(struct, include_extras=True)
    return [name for name in struct.__struct_fields__ if _is_index(hints[name])]


def _is_index(hint: object) -> bool:
    if hint == parts.Index:
        return True
    is_struct = isinstance(hint, type) and issubclass(hint, msgspec.Struct)
    return not is_struct and any(map(_is_index, typing.get_args(hint)))


def _parts_in(hint: object) -> Iterator[type[msgspec.Struct]]:
    """Yield the kinds of parts that a field is, or holds."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        yield hint
    for inner in typing.get_args(hint):
        if typing.get_origin(hint) is not Annotated or inner is typing.get_args(hint)[0]:
            yield from _parts_in(inner)


def _indices_given(struct: type[msgspec.Struct], fields: Mapping[str, object]) -> Iterator[str]:
    yield from (name for name in indices(struct) if fields.get(name) not in (None, [], ()))
    hints = typing.get_type_hints(struct, include_extras=True)
    for name, value in fields.items():
        for part in _parts_in(hints.get(name)):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, dict):
                    yield from (f"{name}.{inner}" for inner in _indices_given(part, one))
