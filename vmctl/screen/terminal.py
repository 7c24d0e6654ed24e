"""A guest's changes to the terminal that shows its console, and their undoing.

A guest writes to the person's terminal as if it were its own: SeaBIOS turns line wrap off, editors
switch to another screen, and a guest that ends or is left leaves it so. Each change is noted as it
passes, and only what was changed is undone: what a terminal does with a command that changes
nothing is not the same everywhere.

Source: ECMA-48; DEC STD 070; xterm's ctlseqs.
"""

import re
from typing import Final

_TAIL: Final = 64
"""How much of a sequence one piece of output may end with; longer ones are none of these."""

_SEQUENCE: Final = re.compile(
    rb"\x1b(?:"
    rb"(?P<reset>c)"
    rb"|\[\?(?P<modes>[0-9;]{1,32})(?P<set>[hl])"
    rb"|\[(?P<insert>4)(?P<insert_set>[hl])"
    rb"|\[(?P<region>[0-9;]{0,16})r"
    rb"|\[(?P<shape>[0-9]{0,4}) q"
    rb"|(?P<keypad>[=>])"
    rb"|(?P<charset>[()][0A-Z])"
    rb")|(?P<shift>[\x0e\x0f])"
)

_INVISIBLE: Final = re.compile(rb"(?:\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()].|\x1b[=>78])+\Z")
"""Sequences at the end of output, which may hide that it ends a line."""

# Private modes whose other state a person's shell expects, and whether that is set. The order is
# that in which they are put back: leaving the other screen comes first, as it moves the cursor.
_MODES: Final = {
    **dict.fromkeys((b"1049", b"1047", b"47"), False),
    b"6": False,  # the cursor counts from the scrolling region
    b"7": True,  # lines wrap
    b"25": True,  # the cursor is shown
    b"1": False,  # cursor keys send other sequences
    b"5": False,  # reverse video
    **dict.fromkeys((b"9", b"1000", b"1001", b"1002", b"1003", b"1004"), False),  # the mouse
    **dict.fromkeys((b"1005", b"1006", b"1015", b"1016"), False),
    b"2004": False,  # pasted text is marked
    b"2026": False,  # output is held back
}


class TerminalState:
    """The changes that the output so far has left."""

    def __init__(self) -> None:
        """Begin with a terminal as a shell has it."""
        self._modes: dict[bytes, bool] = {}
        self._others: dict[str, bytes] = {}
        self._tail = b""
        self._end = b""

    def note(self, data: bytes) -> None:
        """Take a piece of the guest's output, in order."""
        self._end = (self._end + data)[-_TAIL:]
        if b"\x1b" not in data and not self._tail and b"\x0e" not in data:
            return
        text = self._tail + data
        end = 0
        for found in _SEQUENCE.finditer(text):
            end = found.end()
            self._apply(found)
        begun = text.rfind(b"\x1b", max(end, len(text) - _TAIL))
        self._tail = text[begun:] if begun >= 0 else b""

    @property
    def is_at_line_start(self) -> bool:
        """Whether the cursor is where a line begins, as far as that can be told."""
        return not self._end or _INVISIBLE.sub(b"", self._end).endswith(b"\n")

    def _apply(self, found: re.Match[bytes]) -> None:
        if found["reset"]:
            self._modes.clear()
            self._others.clear()
        elif found["modes"]:
            for mode in found["modes"].split(b";"):
                if mode in _MODES:
                    self._modes[mode] = found["set"] == b"h"
        elif found["insert"]:
            self._note_other("insert", b"\x1b[4l", found["insert_set"] == b"h")
        elif found["region"] is not None:
            # Putting it back moves the cursor, which is kept.
            self._note_other("region", b"\x1b7\x1b[r\x1b8", bool(found["region"]))
        elif found["shape"] is not None:
            self._note_other("shape", b"\x1b[0 q", found["shape"] not in {b"", b"0"})
        elif found["keypad"]:
            self._note_other("keypad", b"\x1b>", found["keypad"] == b"=")
        elif found["charset"]:
            which = found["charset"][:1]
            usual = which + b"B"
            self._note_other(f"charset {which!r}", b"\x1b" + usual, found["charset"] != usual)
        else:
            self._note_other("shift", b"\x0f", found["shift"] == b"\x0e")

    def _note_other(self, name: str, undo: bytes, is_changed: bool) -> None:
        if is_changed:
            self._others[name] = undo
        else:
            self._others.pop(name, None)

    def restore(self) -> bytes:
        """Return what to write so that the terminal is as a shell expects it, on a line of its own.

        Nothing where the guest has written nothing.
        """
        if not self._end:
            return b""
        modes = (
            b"\x1b[?" + mode + (b"h" if usual else b"l")
            for mode, usual in _MODES.items()
            if self._modes.get(mode, usual) is not usual
        )
        # Colours cost nothing to reset, and are a guest's commonest.
        changed = b"".join((*modes, *self._others.values(), b"\x1b[0m"))
        return changed + (b"" if self.is_at_line_start else b"\r\n")
