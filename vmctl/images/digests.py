"""Digests of images: an algorithm and its hexadecimal digits."""

from typing import NamedTuple

from vmctl.client import CommandError

DIGITS = {"sha256": 64, "sha512": 128}
"""How many digits each algorithm has."""


class Digest(NamedTuple):
    """A digest, whose text is the name of a file of the store."""

    algorithm: str
    hexadecimal: str

    def __str__(self) -> str:
        return f"{self.algorithm}-{self.hexadecimal}"


def parse_digest(text: str) -> Digest:
    """Read a digest such as `sha256:9f86...`.

    Raises:
        CommandError: it is none.
    """
    algorithm, _, digits = text.partition(":")
    digits = digits.lower()
    is_hexadecimal = digits.isascii() and not digits.strip("0123456789abcdef")
    if len(digits) != DIGITS.get(algorithm) or not is_hexadecimal:
        raise CommandError(f"invalid digest: {text}: sha256: or sha512: and its digits")
    return Digest(algorithm, digits)
