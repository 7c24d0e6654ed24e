"""The words of a vm.conf: bytes to tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmd.config.lexer import RESERVED, Kind, Lexer, Macros, Token


def tokens_of(data: bytes, macros: dict[str, str] | None = None) -> tuple[list[Token], list[str]]:
    """Return the tokens of a file, without the last newline, and the errors, with lines."""
    reports: list[str] = []
    lexer = Lexer(
        "f", data, Macros(macros or {}), lambda text: reports.append(f"{lexer.where}: {text}")
    )
    found = []
    while (token := lexer.next()).kind is not Kind.END:
        found.append(token)
    # There is none after an open quote, or if the last line ends in a backslash.
    assert reports or not found or found[-1].kind is Kind.NEWLINE
    return found[:-1], reports


def texts(data: bytes, macros: dict[str, str] | None = None) -> list[str]:
    """Return the values of the tokens of a file without errors."""
    found, reports = tokens_of(data, macros)
    assert reports == []
    return [token.text for token in found]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a b\tc", ["a", "b", "c"]),
        (b"a\\\nb", ["ab"]),
        (b"a \\\n b", ["a", "b"]),
        (b"a # b\nc", ["a", "\n", "c"]),
        (b"# a \\\nb\nc", ["\n", "c"]),
        (b"a#b", ["a"]),
        (b"a{b}c(d)e,f=g!h", [*"a{b}c(d)e,f=g!h"]),
        (b"a.b-c", ["a.b-c"]),
        (b".b", [".", "b"]),
        (b"a\\;b", ["a;b"]),
        (b"a\\ b", ["a", "b"]),
        (b"a\\\\b", ["a\\b"]),
        (b'a"b c', ['a"b', "c"]),
        (b"\r\n", ["\r", "\n"]),
        (b"\xc3\xa9", ["\xc3", "\xa9"]),
        (b'"\xc3\xa9"', ["é"]),
        (b'"\xff"', ["\udcff"]),
        (b"a\0b", ["a", "\0", "b"]),
        (b"1 -2 3/4", ["1", "-2", "3", "/4"]),
        (b"- 1-2 -x 1.2", ["-", "1-2", "-", "x", "1.2"]),
        (b"-\\\n5", ["-5"]),
    ],
)
def test_tokens(data: bytes, expected: list[str]) -> None:
    """Blanks and a few characters divide words; a backslash joins lines."""
    assert texts(data) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'"a b"', "a b"),
        (b"'a \"b\"'", 'a "b"'),
        (rb'"a \" b"', 'a " b'),
        (rb"'a \" b'", r"a \" b"),
        (rb'"a\ b"', "a b"),
        (b'"a\\\tb"', "a\tb"),
        (rb'"a\\b"', r"a\\b"),
        (rb'"a\nb"', r"a\nb"),
        (b'"a\nb"', "ab"),
        (b'"a\\\nb"', "ab"),
        (b'"$a # b"', "$a # b"),
        (b'"a"', "a"),
        (b'""', ""),
        (b'"' + b"a" * 8094 + b'"', "a" * 8094),
    ],
)
def test_quotes(data: bytes, expected: str) -> None:
    """In quotes a backslash escapes the quote and blanks; line breaks vanish."""
    assert tokens_of(data) == ([Token(Kind.QUOTED, expected)], [])


def test_kinds() -> None:
    """A word of the grammar is a keyword only without quotes; `0x1` and `1G` are no numbers."""
    found, _ = tokens_of(b'vm "vm" x 5 1G 0x1 {')
    kinds = [Kind.KEYWORD, Kind.QUOTED, Kind.WORD, Kind.NUMBER, Kind.WORD, Kind.WORD, Kind.SYMBOL]
    assert [token.kind for token in found] == kinds


@pytest.mark.parametrize("after", list(" \t\n\v\f\r),/}="))
def test_what_ends_a_number(after: str) -> None:
    """A number ends before white space and a few characters; otherwise it is a word."""
    found, _ = tokens_of(f"12{after}".encode())
    assert (found[0] if found else Token(Kind.NUMBER, "12", 12)) == Token(Kind.NUMBER, "12", 12)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9223372036854775807", (1 << 63) - 1),
        ("-9223372036854775808", -(1 << 63)),
        ("0" * 6000 + "7", 7),
        ("-0", 0),
    ],
)
def test_large_numbers(text: str, number: int) -> None:
    """Numbers have 64 bits, with any number of leading zeros."""
    found, reports = tokens_of(text.encode())
    assert (found[0].number, reports) == (number, [])


@pytest.mark.parametrize(
    ("data", "reports"),
    [
        (b"9223372036854775808", ['f:1: "9223372036854775808" invalid number: too large']),
        (b"-9223372036854775809", ['f:1: "-9223372036854775809" invalid number: too small']),
        (b'"\0"', ["f:1: syntax error at a null character"]),
        (b"a\n$b", ["f:2: macro 'b' not defined"]),
        (b'"' + b"a" * 8095 + b'"', ["f:1: string too long"]),
        (b"a" * 8096, ["f:1: string too long"]),
        (b"1" * 8096, ["f:1: string too long"]),
        (b"$" + b"a" * 8096, ["f:1: string too long"]),
    ],
)
def test_what_cannot_be_a_token(data: bytes, reports: list[str]) -> None:
    """An invalid token is reported, and the rest of the line dropped; the next line is read."""
    found, told = tokens_of(data + b" $undefined\nb")
    assert told == reports
    assert found[-3:] == [
        Token(Kind.ERROR),
        Token(Kind.NEWLINE, "\n"),
        Token(Kind.WORD, "b"),
    ]


@pytest.mark.parametrize("data", [b'a\n"b', b'a\n"b\nc', b"a\n'b\\", b"a\n'\"\\\n"])
def test_a_quote_that_does_not_end(data: bytes) -> None:
    """The end of the file within quotes is reported once, with the line where they begin."""
    reports: list[str] = []
    lexer = Lexer("f", data, Macros({}), lambda text: reports.append(f"{lexer.where}: {text}"))
    kinds: list[Kind] = []
    while not kinds or kinds[-1] is not Kind.END:
        kinds.append(lexer.next().kind)
    assert kinds == [Kind.WORD, Kind.NEWLINE, Kind.END]
    assert reports == ["f:2: reached end of file while parsing quoted string"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"$one", ["1", "b"]),
        (b"$one/c", ["1", "b/c"]),
        (b"$one c", ["1", "b", "c"]),
        (b"x$one", ["x$one"]),
        (b"'$one'", ["$one"]),
        (b"$empty x", ["x"]),
        (b"$empty $one", ["1", "b"]),
        (b"$nested", ["$", "one"]),
        (b"$quoted $one", ["a b", "1", "b"]),
        (b"$comment x\ny", ["\n", "y"]),
        (b"$bytes", ["\xc3", "\xa9"]),
        (b"$lines", ["a", "\n", "b"]),
        (b"$keyword", ["vm"]),
        (b"$half c'", ["b c"]),
    ],
)
def test_macros(data: bytes, expected: list[str]) -> None:
    """A macro is replaced by its characters, but no macro within them is replaced."""
    macros = {
        "one": "1 b",
        "empty": "",
        "nested": "$one",
        "quoted": '"a b"',
        "comment": "#",
        "bytes": "é",
        "lines": "a\nb",
        "keyword": "vm",
        "half": "'b",
    }
    assert texts(data, macros) == expected


def test_macros_of_the_command_line_stand() -> None:
    """A file cannot redefine macros of the command line; its unused ones are reported."""
    macros = Macros({"fixed": "1"})
    macros.define("fixed", "2")
    macros.define("used", "3")
    macros.define("unused", "4")
    macros.define("again", "5")
    assert [macros.value(name) for name in ("fixed", "used", "none")] == ["1", "3", None]
    assert macros.value("again") == "5"
    macros.define("again", "6")
    assert macros.unused() == ("unused", "again")
    assert macros.value("again") == "6"


def test_an_included_file_stands_in_its_place() -> None:
    """Lines are counted per file, and an included one ends with a line of its own."""
    lexer = Lexer("outer", b"a\nb\n", Macros({}), pytest.fail)
    seen = [(lexer.next().text, lexer.where), (lexer.next().text, lexer.where)]
    lexer.include([("inner", b"c\nd")])
    while (token := lexer.next()).kind is not Kind.END:
        seen.append((token.text, lexer.where))
    assert seen == [
        *[("a", "outer:1"), ("\n", "outer:1")],
        *[("c", "inner:1"), ("\n", "inner:1"), ("d", "inner:2"), ("\n", "inner:2")],
        *[("b", "outer:2"), ("\n", "outer:2"), ("\n", "outer:3")],
    ]


@settings(deadline=None)
@given(
    st.binary(max_size=300) | st.text(alphabet=st.sampled_from("ab \\\n\"'$#1-")).map(str.encode)
)
def test_any_bytes_are_tokens(data: bytes) -> None:
    """Any file is read to its end, and every token is of its kind."""
    found, reports = tokens_of(data, {"a": '"$b', "b": "\\"})
    for token in found:
        assert (token.kind is Kind.KEYWORD) <= (token.text in RESERVED)
        assert token.kind is not Kind.SYMBOL or len(token.text) == 1
        assert "\n" not in token.text or token.kind is Kind.NEWLINE
    assert all("\n" not in report for report in reports)
