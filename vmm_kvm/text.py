"""Untrusted text made safe to show: one line, without control characters.

Names of files, images and VMs, words of a guest or a client, and errors that repeat them may hold
any character. They pass through `printable` where they are shown or logged, and nowhere before, so
that comparisons and opens use the original.
"""


def printable(text: str, *, kept: str = "") -> str:
    r"""Return `text` with what would move the cursor, or is no text, as an escape such as `\x1b`.

    Characters in `kept` stay. Names of files may have any byte in them.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in kept else _escaped(one) for one in text)


def _escaped(one: str) -> str:
    number = ord(one)
    if 0xDC80 <= number <= 0xDCFF:  # a byte that is not UTF-8
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
