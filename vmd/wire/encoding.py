r"""Encoding of messages: JSON for clients, MessagePack inside.

Names of files and words of vm.conf may have bytes that are not UTF-8, which Python keeps as lone
surrogates. Inside the daemon they arrive unchanged: each travels as `_ESCAPE` and a character for
the byte. Clients, whose JSON is text, see them as `\xff`.
"""

from collections.abc import Callable
from enum import Enum
from typing import Generic, TypeVar, cast

import msgspec

Sent = TypeVar("Sent")
Taken = TypeVar("Taken")

_ESCAPE = "\U0010ffff"
"""A noncharacter, which no text has. In a file's name it is doubled."""
_ESCAPE_BYTES = _ESCAPE.encode()
_BYTES_AT, _BYTES_END = 0xDC80, 0xDCFF
"""The surrogates that Python makes of bytes."""
_SURROGATES_AT, _SURROGATES_END = 0xD800, 0xDFFF


class WireError(ValueError):
    """Bytes that are no message; `str()` is one line."""


class WireEncoding(Enum):
    """The two ways in which msgspec writes a message."""

    JSON = "json"
    MSGPACK = "msgpack"


class Wire(Generic[Sent, Taken]):
    """One end's codec: it encodes `Sent` and decodes nothing but `Taken`."""

    __slots__ = ("_decoder", "_encoder", "_is_text")

    def __init__(self, taken: object, encoding: WireEncoding) -> None:
        """Use `encoding`; `taken` is the union of messages that this end understands."""
        # A union is no type to a type checker, but the decoded value is one of its members.
        taken_type = cast("type[Taken]", taken)
        self._encoder: msgspec.json.Encoder | msgspec.msgpack.Encoder
        self._decoder: msgspec.json.Decoder[Taken] | msgspec.msgpack.Decoder[Taken]
        self._is_text = encoding is WireEncoding.JSON
        if self._is_text:
            self._encoder = msgspec.json.Encoder()
            self._decoder = msgspec.json.Decoder(taken_type)
        else:
            self._encoder = msgspec.msgpack.Encoder()
            self._decoder = msgspec.msgpack.Decoder(taken_type)

    def encode(self, message: Sent) -> bytes:
        """Return the bytes of a message."""
        try:
            data = self._encoder.encode(message)
        except UnicodeEncodeError:
            change = _shown if self._is_text else _escaped
            return self._encoder.encode(_changed(message, change))
        if not self._is_text and _ESCAPE_BYTES in data:
            return self._encoder.encode(_changed(message, _escaped))
        return data

    def decode(self, data: bytes) -> Taken:
        """Return the message that `data` is.

        Raises:
            WireError: it is none that this end understands.
        """
        try:
            message = self._decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as err:
            raise WireError(" ".join(str(err).split())) from err
        if not self._is_text and _ESCAPE_BYTES in data:
            return cast("Taken", _changed(message, _restored))
        return message


def _changed(value: object, change: Callable[[str], str]) -> object:
    """Return a message, or a part of one, with all its text changed."""
    if type(value) is str:
        return change(value)
    if isinstance(value, msgspec.Struct):
        fields = {name: _changed(getattr(value, name), change) for name in value.__struct_fields__}
        return msgspec.structs.replace(value, **fields)
    if isinstance(value, tuple):
        items = [_changed(item, change) for item in value]
        return value._make(items) if hasattr(value, "_make") else tuple(items)
    return value


def _escaped(text: str) -> str:
    """Return text that UTF-8 can hold; see `_restored`."""
    return "".join(
        _ESCAPE + chr(ord(one) - _SURROGATES_AT)
        if _SURROGATES_AT <= ord(one) <= _SURROGATES_END
        else _ESCAPE * 2
        if one == _ESCAPE
        else one
        for one in text
    )


def _restored(text: str) -> str:
    """Undo `_escaped`. An escape without what belongs to it stays: only a broken peer sends one."""
    head, *tails = text.split(_ESCAPE)
    parts, is_escaped = [head], bool(tails)
    for tail in tails:
        if not is_escaped:  # the second of two
            parts.append(tail)
            is_escaped = True
        elif not tail:
            parts.append(_ESCAPE)
            is_escaped = False
        else:
            number = ord(tail[0]) + _SURROGATES_AT
            is_surrogate = number <= _SURROGATES_END
            parts.append(chr(number) + tail[1:] if is_surrogate else _ESCAPE + tail)
    return "".join(parts)


def _shown(text: str) -> str:
    """Return text with each byte that is no text as an escape that shows it."""
    return "".join(
        one
        if not _SURROGATES_AT <= ord(one) <= _SURROGATES_END
        else f"\\x{ord(one) - 0xDC00:02x}"
        if _BYTES_AT <= ord(one) <= _BYTES_END
        else f"\\u{ord(one):04x}"
        for one in text
    )
