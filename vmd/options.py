"""The command line of vmd.

Source: section 5.1 of OpenBSD's behaviour; what has two dashes is ours.
"""

import getopt
from collections.abc import Sequence
from typing import NamedTuple

USAGE = """\
usage: vmd [-dnv] [-D macro=value] [-f file] [--skip-broken] [--socket path]
           [--uids first:count | --user] [--zygotes number]
       vmd --version"""


ZYGOTES_MAX = 16
"""Each costs memory, and processes that wait ready."""


class UsageError(Exception):
    """A command line that cannot be understood."""


class Options(NamedTuple):
    """Settings of the command line."""

    is_foreground: bool = False
    """-d"""
    is_check: bool = False
    """-n"""
    verbosity: int = 0
    """How many -v."""
    macros: tuple[str, ...] = ()
    """Arguments of -D, as they are."""
    config: str | None = None
    """-f"""
    socket: str | None = None
    uids: str | None = None
    is_user: bool = False
    skips_broken: bool = False
    asks_version: bool = False
    zygotes: int = 0
    """Zygotes with layouts of their own."""


def parse_options(arguments: Sequence[str]) -> Options:
    """Read the arguments behind the program's name.

    Raises:
        UsageError: one is unknown, or there are operands.
    """
    try:
        found, operands = getopt.getopt(
            list(arguments),
            "dnvD:f:",
            ["skip-broken", "socket=", "uids=", "user", "version", "zygotes="],
        )
    except getopt.GetoptError as err:
        raise UsageError(str(err)) from err
    if operands:
        raise UsageError(operands[0])
    options = Options()
    for name, value in found:
        match name:
            case "-d":
                options = options._replace(is_foreground=True)
            case "-n":
                options = options._replace(is_check=True)
            case "-v":
                options = options._replace(verbosity=options.verbosity + 1)
            case "-D":
                options = options._replace(macros=(*options.macros, value))
            case "-f":
                options = options._replace(config=value)
            case "--socket":
                options = options._replace(socket=value)
            case "--uids":
                options = options._replace(uids=value)
            case "--zygotes":
                options = options._replace(zygotes=_number(name, value))
            case "--version":
                options = options._replace(asks_version=True)
            case "--skip-broken":
                options = options._replace(skips_broken=True)
            case _:
                options = options._replace(is_user=True)
    if options.uids is not None and options.is_user:
        raise UsageError("--uids and --user")
    return options


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= ZYGOTES_MAX:
        raise UsageError(f"{name} {text}: not a number from 1 to {ZYGOTES_MAX}")
    return int(text)
