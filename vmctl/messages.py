"""What commands say on standard error: a line each, in the command's name."""

import sys
from collections.abc import Sequence


def fail(problem: object) -> int:
    """Say what is wrong, in one line or several; returns the exit status."""
    for line in str(problem).splitlines():
        warn(line)
    return 1


def warn(line: str) -> None:
    """Say something."""
    print(f"vmctl: {printable(line)}", file=sys.stderr)


def printable(text: str) -> str:
    r"""Return `text` with what would move the cursor, or is no text, as an escape such as `\x1b`.

    Names of files may have any byte in them.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(one: str) -> str:
    number = ord(one)
    if 0xDC80 <= number <= 0xDCFF:  # a byte that is not UTF-8
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def choice(words: Sequence[str]) -> str:
    """Return `a, b or c`: the words that are possible, for a message."""
    return f"{', '.join(words[:-1])} or {words[-1]}"


def bytes_hint(text: str, unit: str) -> str:
    """Return a second line for a size without a unit, as people type it: it is in bytes."""
    number = text.strip()
    if not number.isdecimal() or not number.strip("0"):
        return ""
    return f"\n{number} is a number of bytes: did you mean {number}{unit}?"
