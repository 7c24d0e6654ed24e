"""How messages are written as bytes and read back: JSON for clients, MessagePack inside."""

from enum import Enum
from typing import Generic, TypeVar, cast

import msgspec

Sent = TypeVar("Sent")
Taken = TypeVar("Taken")


class WireError(ValueError):
    """Bytes that are no message; `str()` is one line."""


class WireEncoding(Enum):
    """The two ways in which msgspec writes a message."""

    JSON = "json"
    MSGPACK = "msgpack"


class Wire(Generic[Sent, Taken]):
    """One end's way to speak: it encodes `Sent` and decodes nothing but `Taken`."""

    __slots__ = ("_decoder", "_encoder")

    def __init__(self, taken: object, encoding: WireEncoding) -> None:
        """Speak `encoding`; `taken` is the union of what this end understands."""
        # A union is no type to a type checker; what is decoded is of it all the same.
        taken_type = cast("type[Taken]", taken)
        self._encoder: msgspec.json.Encoder | msgspec.msgpack.Encoder
        self._decoder: msgspec.json.Decoder[Taken] | msgspec.msgpack.Decoder[Taken]
        if encoding is WireEncoding.JSON:
            self._encoder = msgspec.json.Encoder()
            self._decoder = msgspec.json.Decoder(taken_type)
        else:
            self._encoder = msgspec.msgpack.Encoder()
            self._decoder = msgspec.msgpack.Decoder(taken_type)

    def encode(self, message: Sent) -> bytes:
        """Return the bytes of a message."""
        return self._encoder.encode(message)

    def decode(self, data: bytes) -> Taken:
        """Return the message that `data` is.

        Raises:
            WireError: it is none that this end understands.
        """
        try:
            return self._decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as err:
            raise WireError(" ".join(str(err).split())) from err
