"""Sizes as OpenBSD's scan_scaled(3) and fmt_scaled(3) read and write them.

Source: sections 2.1 and 2.2 of OpenBSD's behaviour; fmt_scaled(3).
"""

_UNITS = "BKMGTPE"
_INT64_MAX = (1 << 63) - 1
_MAX_WHOLE_DIGITS = 20
_MAX_FRACTION_DIGITS = 19


class SizeError(ValueError):
    """A size that cannot be read or written; `str()` is strerror's text for it."""


_INVALID = "Invalid argument"
_TOO_LARGE = "Result too large"


def scan_scaled(text: str) -> int:
    """Read a size such as `512M` or `4.5G`; a bare number is bytes.

    Raises:
        SizeError: not a size, or beyond 64 bits.

    Source: fmt_scaled(3).
    """
    rest = text.lstrip(" \t\n\v\f\r")
    sign = -1 if rest.startswith("-") else 1
    if rest[:1] in {"+", "-"} and rest:
        rest = rest[1:]
    whole, rest = _digits(rest)
    fraction = ""
    if rest.startswith("."):
        fraction, rest = _digits(rest[1:])
    if not whole and not fraction:
        raise SizeError(_INVALID)
    if len(whole) > _MAX_WHOLE_DIGITS or int(whole or "0") > _INT64_MAX:
        raise SizeError(_TOO_LARGE)
    if not rest:
        return sign * int(whole or "0")
    power = _UNITS.find(rest[0].upper())
    if power < 0 or rest[1:2].isalnum():
        raise SizeError(_INVALID)
    factor = 1 << (10 * power)
    fraction = fraction[:_MAX_FRACTION_DIGITS]
    tenths: int = 10 ** len(fraction)
    part = int(fraction or "0") * factor // tenths
    value = int(whole or "0") * factor + part
    if value > _INT64_MAX:
        raise SizeError(_TOO_LARGE)
    return sign * value


def fmt_scaled(number: int) -> str:
    """Write `number` bytes in at most three digits and a unit: `512M`, `4.5G`, `0B`.

    Raises:
        SizeError: 1024 E or more.

    Source: fmt_scaled(3).
    """
    size = abs(number)
    if number == 0:
        return "0B"
    power = 0
    while power < len(_UNITS) and size >= 1024 ** (power + 1):
        power += 1
    if power >= len(_UNITS):
        raise SizeError(_TOO_LARGE)
    factor = 1024**power
    whole = size // factor
    sign = "-" if number < 0 else ""
    if power == 0:
        return f"{sign}{whole}B"
    tenths = ((size % factor) // 1024 ** (power - 1) * 10 + 512) // 1024
    if tenths >= 10:
        whole, tenths = whole + 1, 0
    if whole >= 100:
        return f"{sign}{whole + (tenths >= 5)}{_UNITS[power]}"
    return f"{sign}{whole}.{tenths}{_UNITS[power]}"


def _digits(text: str) -> tuple[str, str]:
    end = 0
    while end < len(text) and text[end] in "0123456789":
        end += 1
    return text[:end], text[end:]
