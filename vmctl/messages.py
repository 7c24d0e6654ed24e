"""What commands say on standard error: a line each, in the command's name."""

import sys


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
