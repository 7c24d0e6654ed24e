"""The parser of vm.conf against the grammar: it reports the same errors as yacc's parser.

The grammar below is that of OpenBSD's vm.conf as its behaviour is described, in section 4.2, in the
form of yacc. It leaves out includes, and all that OpenBSD does not have.
"""

from __future__ import annotations

import random
import re

import pytest

from tests.unit.config.fake_host import FakeHost
from tests.unit.config.yacc import END, Automaton, ConflictError
from vmd.config.lexer import RESERVED, Kind, Lexer, Macros
from vmd.config.parser import read_config

GRAMMAR = {
    "file": (
        *("", "file NL", "file macro NL", "file global NL", "file switch NL", "file vm NL"),
        "file error NL",
    ),
    "macro": ("STRING = STRING",),
    "global": (
        *("LOCAL INET6", "LOCAL INET6 PREFIX STRING", "LOCAL PREFIX STRING"),
        *("SOCKET OWNER owner", "AGENTX agentxopts"),
        "STAGGERED START PARALLEL NUMBER DELAY NUMBER",
    ),
    "agentxopts": ("", "agentxopts CONTEXT STRING", "agentxopts PATH STRING"),
    "switch": ("SWITCH string { optnl swopts }",),
    "swopts": ("swopts swopt nl", "swopt optnl"),
    "swopt": (
        *("ENABLE", "DISABLE", "GROUP string", "INTERFACE string", "LOCKED LLADDR"),
        *("RDOMAIN NUMBER", "UP", "DOWN"),
    ),
    "vm": ("VM string instance { optnl vmopts }",),
    "instance": ("", "INSTANCE string"),
    "vmopts": ("vmopts vmopt nl", "vmopt optnl"),
    "vmopt": (
        *("ENABLE", "DISABLE", "SEV", "SEVES", "DISK string format", "BOOT string"),
        *("BOOT DEVICE CDROM", "BOOT DEVICE DISK", "BOOT DEVICE NET", "CDROM string"),
        *("INTERFACES NUMBER", "MEMORY NUMBER", "MEMORY STRING", "OWNER owner"),
        *("local INTERFACE optstring ifopts", "ALLOW INSTANCE { optnl insflags }"),
        "ALLOW INSTANCE insflag",
    ),
    "format": ("", "FORMAT string"),
    "local": ("", "LOCAL"),
    "ifopts": ("", "{ optnl ifblock }", "iflist"),
    "ifblock": ("ifblock ifopt optnl", "ifopt optnl"),
    "iflist": ("iflist ifopt optcomma", "ifopt"),
    "ifopt": (
        *("SWITCH string", "GROUP string", "locked LLADDR optstring", "RDOMAIN NUMBER"),
        *("UP", "DOWN"),
    ),
    "locked": ("", "LOCKED"),
    "insflags": ("insflag separator insflags", "insflag optnl"),
    "insflag": (
        *("BOOT", "MEMORY", "INTERFACE", "DISK", "CDROM", "INSTANCE"),
        "OWNER owner",
    ),
    "separator": (", optnl", "nl"),
    "owner": ("NUMBER", "STRING"),
    "string": ("STRING string", "STRING"),
    "optstring": ("", "STRING"),
    "optcomma": ("", ","),
    "nl": ("NL optnl",),
    "optnl": ("", "NL optnl"),
}
NAMES = {Kind.WORD: "STRING", Kind.QUOTED: "STRING", Kind.NUMBER: "NUMBER", Kind.NEWLINE: "NL"}

CASES = 400
WORDS = sorted(RESERVED - {"include"})
SYMBOLS = ("{", "}", ",", "=", "\n", "\n", "-", "(", "7", "x", '"y"')
STATEMENTS = (
    *("local inet6", 'local inet6 prefix "fd00::/64"', "local prefix 10.0.0.0/8", "name = value"),
    *("socket owner 5", "socket owner alice", "agentx", "agentx path /x context c"),
    *("staggered start parallel 1 delay 2", "", "", "# comment"),
)
HEADS = ("vm x {", "vm a instance b {", "switch s { interface br0\n")
OPTIONS = (
    *("enable", "disable", "sev", "seves", "disk disk0.img", "disk disk1.img format raw"),
    *("interface", "local interface", "interface tap1 { up }", "interface up down"),
    *("interface up , down", "interface up down , rdomain 1", "interface { lladdr\n up\ndown }"),
    *("interface tap2 switch s lladdr", "interface locked lladdr 0:1:2:3:4:5 group g"),
    *("boot bsd.rd", "boot device net", "cdrom a b", "interfaces 2", "memory 64M", "owner 5"),
    *("memory 67108864", "owner alice", "allow instance boot", "allow instance { boot , disk }"),
    *("allow instance { boot\n disk\n }", "allow instance { boot ,\n\n owner 3 , memory }"),
    *("group g", "interface br1", "locked lladdr", "rdomain 3", "up", "down"),
)


def text_of(chance: random.Random) -> str:
    """Return a file of some statements, more or less right."""
    parts = []
    for _ in range(chance.randrange(1, 4)):
        if chance.random() < 0.3:
            parts.append(chance.choice(STATEMENTS) + "\n")
            continue
        parts.append(chance.choice(HEADS) + chance.choice((" ", "\n")))
        parts += (
            chance.choice(OPTIONS) + chance.choice(("\n", "\n", "\n", "\n\n", " "))
            for _ in range(chance.randrange(5))
        )
        parts.append("}" + chance.choice(("\n", "\n", " ")))
    text = "".join(parts)
    for _ in range(chance.choice((0, 0, 1, 1, 2))):
        word = chance.choice(list(re.finditer(r"[{},=]|[^\s{},=]+|\n", text)) or [None])
        if word is not None:
            new = chance.choice(chance.choice((WORDS, SYMBOLS)))
            text = (
                text[: word.start()]
                + chance.choice((new, "", f"{new} {word[0]}"))
                + text[word.end() :]
            )
    return text + chance.choice(("", "\n"))


def errors_of(automaton: Automaton, data: bytes) -> list[str]:
    """Return the errors of yacc's parser for a file."""
    found: list[str] = []

    def report(message: str = "syntax error") -> None:
        found.append(f"{lexer.where}: {message}")

    def next_token() -> str:
        token = lexer.next()
        if token.kind is Kind.KEYWORD:
            return token.text.upper()
        return END if token.kind is Kind.END else NAMES.get(token.kind, token.text)

    lexer = Lexer("f", data, Macros({}), report)
    automaton.errors(next_token, report)
    return found


def test_complaints_are_those_of_yacc() -> None:
    """Both parsers agree whether a file is right, and which lines are wrong."""
    automaton = Automaton(GRAMMAR)
    chance = random.Random(1)
    right = wrong = 0
    while right + wrong < CASES:
        data = text_of(chance).encode()
        reading = read_config("f", {}, host=FakeHost({"f": data}))
        if any(": syntax error" not in line for line in reading.errors):
            continue  # a wrong value, which the grammar does not describe
        told = [line.partition(" error")[0] + " error" for line in reading.errors]
        assert (data, told) == (data, errors_of(automaton, data))
        right, wrong = right + (not reading.errors), wrong + bool(reading.errors)
    assert right > CASES // 10
    assert wrong > CASES // 10


def test_a_grammar_with_conflicts_is_told() -> None:
    """The automaton refuses an ambiguous grammar."""
    with pytest.raises(ConflictError):
        Automaton({"sum": ("sum + sum", "NUMBER")})
