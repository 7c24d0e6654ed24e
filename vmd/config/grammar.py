"""The parts of vm.conf's grammar rules: look-ahead, complaints, and recovery after one.

A rule is a function that takes the tokens it describes. An error is reported, and StatementError
unwinds to the start of a statement, where the rest of the line is skipped and reading continues
with the next statement. After a syntax error, further ones are suppressed until three tokens in a
row were right, so that one mistake within a block causes one complaint.

Source: section 4.6 of OpenBSD's behaviour.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from vmd.config.host import Host
from vmd.config.lexer import Kind, Lexer, Macros, Token
from vmd.config.model import Owner
from vmd.config.values import ValueRefusedError

_Value = TypeVar("_Value")

_RIGHT_TOKENS = 3
_QUOTED_MAX = 40
"""Characters of a token that a complaint quotes."""
_ID_MAX = (1 << 32) - 2


class StatementError(Exception):
    """A wrong statement, which has been reported to the operator."""


class Tokens:
    """The tokens of a vm.conf, taken one by one, and the lines about its errors."""

    def __init__(self, name: str, data: bytes, macros: Macros) -> None:
        self.complaints: list[str] = []
        self._lexer = Lexer(name, data, macros, self.report)
        self._ahead: Token | None = None
        self._silent = 0
        self._blocks: list[str] = []  # `file:line` of the blocks that are open

    @property
    def where(self) -> str:
        """`file:line` of the token that was read last."""
        return self._lexer.where

    @property
    def depth(self) -> int:
        """How many files are open."""
        return self._lexer.depth

    def include(self, files: Sequence[tuple[str, bytes]]) -> None:
        """Continue in other files. The last token taken ended a line, and none is read ahead."""
        assert self._ahead is None
        self._lexer.include(files)

    def report(self, message: str) -> None:
        """Report an error about the last token."""
        self.complaints.append(f"{self.where}: {message}")

    def refuse(self, message: str) -> NoReturn:
        """Complain of a statement that means nothing."""
        self.report(message)
        raise StatementError

    def refuse_value(self, detail: str, message: str) -> NoReturn:
        """Complain of a value: first its fault, on a line of its own."""
        self.complaints.append(detail)
        self.refuse(message)

    def syntax_error(self) -> NoReturn:
        """Complain of an unexpected token, unless an earlier error may have caused it.

        OpenBSD's text, with the token. A keyword or the end of the file can mean that an earlier
        brace is missing: then it also says where the block begins.
        """
        if not self._silent:
            token = self.peek()
            text = f"syntax error{_place(token)}"
            is_telling = token.kind in {Kind.END, Kind.KEYWORD}
            if is_telling and self._blocks and self._blocks[-1] != self.where:
                text += f" in the block that begins at {self._blocks[-1]}"
            self.report(text)
        raise StatementError

    def recover(self) -> bool:
        """Skip the rest of a line; returns False at the end of the file."""
        self._silent = _RIGHT_TOKENS
        while (token := self.peek()).kind is not Kind.END:
            if token.kind is Kind.NEWLINE:
                self.take()
                return True
            self._ahead = None
        return False

    def peek(self) -> Token:
        """Return the next token, without taking it."""
        if self._ahead is None:
            self._ahead = self._lexer.next()
        return self._ahead

    def take(self) -> Token:
        """Take the next token."""
        token = self.peek()
        self._ahead = None
        self._silent = max(self._silent - 1, 0)
        return token

    def is_at(self, text: str) -> bool:
        """Tell whether a keyword, a symbol or a newline is next."""
        token = self.peek()
        return token.text == text and token.kind in {Kind.KEYWORD, Kind.SYMBOL, Kind.NEWLINE}

    def is_at_own(self, word: str) -> bool:
        """Tell whether a keyword of this vmd alone is next, where OpenBSD takes no string."""
        token = self.peek()
        return token.kind is Kind.WORD and token.text == word

    def accept(self, text: str) -> bool:
        """Take a keyword, symbol or newline if it is next."""
        if not self.is_at(text):
            return False
        self.take()
        return True

    def expect(self, text: str) -> None:
        """Take a keyword, symbol or newline, which has to be next."""
        if not self.accept(text):
            self.syntax_error()

    def newlines(self) -> None:
        """Take any number of newlines."""
        while self.accept("\n"):
            pass

    def one_string(self) -> str:
        """Take one string."""
        if not self.peek().is_string:
            self.syntax_error()
        return self.take().text

    def string(self) -> str:
        """Take one or more strings, which are one: `string = STRING { STRING }`."""
        found = self.one_string()
        while self.peek().is_string:
            found += self.take().text
        # Decoded as a whole: a character's bytes may come from several strings.
        return found.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")

    def number(self) -> int:
        """Take a number."""
        if self.peek().kind is not Kind.NUMBER:
            self.syntax_error()
        return self.take().number

    def block(self, option: Callable[[], None]) -> None:
        """Take a block: `"{" {NL} option {NL} { option NL {NL} } "}"`."""
        with self._open_block():
            option()
            self.newlines()
            while not self.accept("}"):
                option()
                self.expect("\n")
                self.newlines()

    def loose_block(self, option: Callable[[], None]) -> None:
        """Take a block whose options may share a line.

        block = "{" {NL} option {NL} { option {NL} } "}"
        """
        with self._open_block():
            option()
            self.newlines()
            while not self.accept("}"):
                option()
                self.newlines()

    @contextmanager
    def _open_block(self) -> Iterator[None]:
        """Take the beginning of a block, and remember it until the block ends."""
        self.expect("{")
        self._blocks.append(self.where)
        try:
            self.newlines()
            yield
        finally:
            self._blocks.pop()

    def checked(self, check: Callable[[str], _Value], text: str, what: str = "") -> _Value:
        """Return the result of `check` for a value, or complain in its words, after `what`."""
        try:
            return check(text)
        except ValueRefusedError as err:
            self.refuse(f"{what}{err}")

    def owner(self, host: Host) -> Owner:
        """Take `owner = NUMBER | STRING`: a uid, or `user`, `user:group`, `user:`, `:group`."""
        if self.peek().kind is Kind.NUMBER:
            uid = self.take().number
            if not 0 <= uid <= _ID_MAX:
                self.refuse(f"failed to get user: {uid}")
            return Owner(uid)
        user_name, _, group_name = self.one_string().partition(":")
        user = _found(host.find_user, user_name)
        if user_name and user is None:
            self.refuse(f"failed to get user: {user_name}")
        group = _found(host.find_group, group_name)
        if group_name and group is None:
            self.refuse(f"failed to get group: {group_name}")
        return Owner(user, group)


def _place(token: Token) -> str:
    """Name the token of a syntax error; nothing for one that was reported already."""
    match token.kind:
        case Kind.ERROR:
            return ""
        case Kind.END:
            return " at the end of the file"
        case Kind.NEWLINE:
            return " at the end of the line"
        case Kind.SYMBOL if token.text == "\r":
            return " at a carriage return: the file has the line endings of DOS"
        case Kind.SYMBOL if not token.text.isascii():
            return f" at the byte {ord(token.text):#04x}, which is in no word without quotes"
        case _:
            text = token.text
            is_long = len(text) > _QUOTED_MAX
            return f' near "{text[:_QUOTED_MAX]}{"..." if is_long else ""}"'


def _found(find: Callable[[str], int | None], name: str) -> int | None:
    """Look a name up; one that is not there may be the number itself, as for chown(1)."""
    found = find(name) if name else None
    if found is not None or not (name.isascii() and name.isdecimal()):
        return found
    number = int(name) if len(name) <= len(str(_ID_MAX)) else _ID_MAX + 1
    return number if number <= _ID_MAX else None
