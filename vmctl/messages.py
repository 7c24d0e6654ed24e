"""Commands' messages on standard error: a line each, with the command's name."""

import sys
from collections.abc import Sequence

from vmm_kvm.text import printable

CONSOLE_CONDITION = "console="
"""Prefix of a condition to wait for: a text on the console."""
GUEST_CONDITIONS = ("ready", "file=", "port=", "unit=")
"""Prefixes of conditions that the guest's agent checks."""


def fail(problem: object) -> int:
    """Print an error, in one line or several; returns the exit status."""
    for line in str(problem).splitlines():
        warn(line)
    return 1


def warn(line: str) -> None:
    """Say something."""
    print(f"vmctl: {printable(line)}", file=sys.stderr)


def choice(words: Sequence[str]) -> str:
    """Return `a, b or c`: the words that are possible, for a message."""
    return f"{', '.join(words[:-1])} or {words[-1]}"


def bytes_hint(text: str, unit: str) -> str:
    """Return a second line for a size without a unit, as people type it: it is in bytes."""
    number = text.strip()
    if not (number.isascii() and number.isdecimal()) or not number.strip("0"):
        return ""
    return f"\n{number} is a number of bytes: did you mean {number}{unit}?"
