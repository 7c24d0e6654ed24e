"""The words of a vm.conf: characters to tokens, through macros and included files.

Text is bytes: each character here is one (latin-1), and the contents of quotes and words are
decoded as paths are. Two things are undone before a token begins to be read: a backslash at the end
of a line joins the next one, and `$name` is replaced by the characters of the macro, which are then
read as if they stood there, save that no macro is replaced within them.

Source: vm.conf(5); section 4.1 of OpenBSD's behaviour.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, auto
from string import ascii_letters, digits, punctuation
from typing import NamedTuple

RESERVED = frozenset(
    {
        *("add", "agentx", "allow", "boot", "cdrom", "context", "delay", "device", "disable"),
        *("disk", "down", "enable", "format", "group", "id", "include", "inet6", "instance"),
        *("interface", "interfaces", "lladdr", "local", "locked", "memory", "net", "owner"),
        *("parallel", "path", "prefix", "rdomain", "sev", "seves", "size", "socket"),
        *("staggered", "start", "switch", "up", "vm"),
    }
)
"""Words that are keywords wherever they stand without quotes."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""How some editors begin a file in UTF-8. It is passed over."""

_TOKEN_MAX = 8095
_EXPANSION_MAX = 4 << 20  # characters of all macros, where they are used
_NUMBER_MIN, _NUMBER_MAX = -(1 << 63), (1 << 63) - 1
_NUMBER_DIGITS_MAX = 19

_DIGITS = frozenset(digits)
_MACRO_NAME = frozenset(ascii_letters + digits + "_")
_WORD_STARTS = frozenset(ascii_letters + digits + ":_/")
_IN_WORDS = frozenset(ascii_letters + digits + punctuation) - frozenset("(){}!=#,")
_AFTER_NUMBERS = frozenset(" \t\n\v\f\r),/}=")

_END_OF_FILE = ""
# Mark the beginning and end of a macro's characters among those that were put back.
_MACRO_BEGINS = "<begin"
_MACRO_ENDS = "<end"


class Kind(Enum):
    """The kind of a token."""

    KEYWORD = auto()
    WORD = auto()
    """A string without quotes."""
    QUOTED = auto()
    NUMBER = auto()
    SYMBOL = auto()
    """Any other character."""
    NEWLINE = auto()
    ERROR = auto()
    """No token; it has been reported, and the rest of its line skipped."""
    END = auto()


class Token(NamedTuple):
    """A token: its text, and its value if it is a number."""

    kind: Kind
    text: str = ""
    number: int = 0

    @property
    def is_string(self) -> bool:
        """Whether the grammar accepts it as a string."""
        return self.kind in {Kind.WORD, Kind.QUOTED}


class Macros:
    """Macros by name. Those of the command line override those of files."""

    def __init__(self, fixed: Mapping[str, str]) -> None:
        self._fixed = dict(fixed)
        self._defined: dict[str, str] = {}
        self._used: set[str] = set()

    def define(self, name: str, value: str) -> None:
        """Define a macro, as a file does."""
        if name not in self._fixed:
            self._defined[name] = value
            self._used.discard(name)

    def value(self, name: str) -> str | None:
        """Return a macro's text, and note its use."""
        self._used.add(name)
        return self._fixed.get(name, self._defined.get(name))

    def unused(self) -> tuple[str, ...]:
        """Return the names that a file defines and nothing uses."""
        return tuple(name for name in self._defined if name not in self._used)


class _File:
    """A file that is being read; `back` are characters to read again, the last first."""

    __slots__ = ("at", "back", "following", "has_ended", "line", "name", "text")

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.text = data.decode("latin-1")
        self.at = len(BYTE_ORDER_MARK) if data.startswith(BYTE_ORDER_MARK) else 0
        self.line = 1
        self.back: list[str] = []
        self.has_ended = False
        self.following: Sequence[tuple[str, bytes]] = ()
        """Files to be read after this one, in its place."""


class Lexer:
    """Tokens of a file and of those that it includes.

    `report` is called with each error; `where` then returns file and line.
    """

    def __init__(
        self, name: str, data: bytes, macros: Macros, report: Callable[[str], None]
    ) -> None:
        self._files = [_File(name, data)]
        self._macros = macros
        self._report = report
        self._is_expanding = False
        self._expanded = 0
        self._line = 1

    @property
    def where(self) -> str:
        """`file:line` of the token that was read last."""
        return f"{self._files[-1].name}:{self._line}"

    @property
    def depth(self) -> int:
        """How many files are open: one, and those that are included."""
        return len(self._files)

    def include(self, files: Sequence[tuple[str, bytes]]) -> None:
        """Continue in other files, names and contents, and return to this one at their end."""
        if files:
            (name, data), *following = files
            self._files.append(_File(name, data))
            self._files[-1].following = following

    def _leave(self) -> None:
        """Leave a file that has ended, for the next of those that were included together."""
        self.include(self._files.pop().following)

    def next(self) -> Token:
        """Read a token."""
        while True:
            char = self._get()
            while char in {" ", "\t"}:
                char = self._get()
            self._line = self._files[-1].line
            if char == "#":
                while char not in {"\n", _END_OF_FILE}:
                    char = self._get()
            if char != "$" or self._is_expanding:
                break
            name = self._macro_name()
            if name is None or not self._expand(name):
                return self._error()
        if char in {'"', "'"}:
            return self._quoted(char)
        if char == "-" or char in _DIGITS:
            number = self._number(char)
            if number is not None:
                return number
        if char in _WORD_STARTS:
            return self._word(char)
        if char == "\n":
            self._line = self._files[-1].line
            self._files[-1].line += 1
            return Token(Kind.NEWLINE, char)
        return Token(Kind.END if char == _END_OF_FILE else Kind.SYMBOL, char)

    def _quoted(self, quote: str) -> Token:
        found: list[str] = []
        while True:
            char = self._get_quoted(quote)
            if char == quote:
                return Token(Kind.QUOTED, _decoded(found))
            if char == "\\":
                after = self._get_quoted(quote)
                if after in {quote, " ", "\t", "\n"}:
                    char = after
                elif after == _END_OF_FILE:
                    return Token(Kind.END)
                else:
                    self._put_back(after)
            if char == "\n":
                self._files[-1].line += 1
                continue
            if char == _END_OF_FILE:
                return Token(Kind.END)
            if char == "\0":
                self._report("syntax error at a null character")
                return self._error()
            if len(found) == _TOKEN_MAX - 1:
                return self._too_long()
            found.append(char)

    def _number(self, first: str) -> Token | None:
        """Read a number; None, and nothing but `first` is read, if it turns out to be a word."""
        found = [first]
        while (char := self._get()) in _DIGITS:
            found.append(char)
            if len(found) > _TOKEN_MAX:
                return self._too_long()
        self._put_back(char)
        if len(found) > 1 or first != "-":
            if char == _END_OF_FILE or char in _AFTER_NUMBERS:
                return self._valued("".join(found))
            for each in reversed(found[1:]):
                self._put_back(each)
        return Token(Kind.SYMBOL, first) if first == "-" else None

    def _valued(self, text: str) -> Token:
        is_negative = text.startswith("-")
        significant = text.lstrip("-0") or "0"
        if len(significant) <= _NUMBER_DIGITS_MAX:
            number = -int(significant) if is_negative else int(significant)
            if _NUMBER_MIN <= number <= _NUMBER_MAX:
                return Token(Kind.NUMBER, text, number)
        self._report(f'"{text}" invalid number: too {"small" if is_negative else "large"}')
        return self._error()

    def _word(self, first: str) -> Token:
        found = [first]
        while (char := self._get()) in _IN_WORDS:
            found.append(char)
            if len(found) > _TOKEN_MAX:
                return self._too_long()
        self._put_back(char)
        text = _decoded(found)
        return Token(Kind.KEYWORD if text in RESERVED else Kind.WORD, text)

    def _macro_name(self) -> str | None:
        found: list[str] = []
        while (char := self._get()) in _MACRO_NAME:
            found.append(char)
            if len(found) >= _TOKEN_MAX:
                self._report("string too long")
                return None
        self._put_back(char)
        return "".join(found)

    def _expand(self, name: str) -> bool:
        value = self._macros.value(name)
        if value is None:
            self._report(f"macro '{name}' not defined")
            return False
        self._expanded += len(value)
        if self._expanded > _EXPANSION_MAX:
            self._report("string too long")
            return False
        back = self._files[-1].back
        back.append(_MACRO_ENDS)
        back.extend(reversed(_encoded(value)))
        back.append(_MACRO_BEGINS)
        return True

    def _too_long(self) -> Token:
        self._report("string too long")
        return self._error()

    def _error(self) -> Token:
        """Drop the rest of the line."""
        while (char := self._get()) not in {"\n", _END_OF_FILE}:
            pass
        self._put_back(char)
        return Token(Kind.ERROR)

    def _get(self) -> str:
        """Read a character outside quotes. Every file ends with a newline, one more if need be."""
        char = self._get_plain()
        while char == "\\":
            char = self._get_plain()
            if char != "\n":
                break
            file = self._files[-1]
            self._line = file.line
            file.line += 1
            char = self._get_plain()
        while char == _END_OF_FILE:
            if not self._files[-1].has_ended:
                self._files[-1].has_ended = True
                return "\n"
            if len(self._files) == 1:
                break
            self._leave()
            char = self._get()
        return char

    def _get_quoted(self, quote: str) -> str:
        char = self._get_plain()
        if char == _END_OF_FILE:
            self._report("reached end of file while parsing quoted string")
            if len(self._files) > 1:
                self._leave()
                return quote
        return char

    def _get_plain(self) -> str:
        file = self._files[-1]
        while file.back:
            char = file.back.pop()
            if char == _MACRO_BEGINS:
                self._is_expanding = True
            elif char == _MACRO_ENDS:
                self._is_expanding = False
            else:
                return char
        at = file.at
        file.at += 1
        return file.text[at : at + 1]

    def _put_back(self, char: str) -> None:
        if char != _END_OF_FILE:
            self._files[-1].back.append(char)


def _decoded(characters: Iterable[str]) -> str:
    """Make text of bytes, as the file system does."""
    return "".join(characters).encode("latin-1").decode("utf-8", "surrogateescape")


def _encoded(text: str) -> str:
    """Make one character of each byte of a text."""
    return text.encode("utf-8", "surrogateescape").decode("latin-1")
