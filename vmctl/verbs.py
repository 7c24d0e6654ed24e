"""The daemon's verbs: their usage, and a short way to read a command line that is plain and right.

`vmctl.cli` declares them for typer, which explains, completes and refuses; importing it costs more
than all else that `vmctl status` does. A test holds the two against each other.

Source: section 3.1 of OpenBSD's behaviour, for the usage.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

OTHERS = ("create", "doctor", "image", "run")
"""Verbs that need no daemon."""

START_VALUES = {
    "-B": "boot_device",
    "-b": "boot",
    "-d": "disks",
    "-i": "interfaces",
    "-m": "memory",
    "-n": "switches",
    "-p": "cpus",
    "-r": "cdrom",
    "-t": "template",
    "--append": "append",
    "--firmware": "firmware",
    "--initrd": "initrd",
}
"""Options of start, each of which may come more than once, to be used or refused."""

Values = dict[str, bool | int | str | tuple[str, ...] | None]


class Verb(NamedTuple):
    """How a verb is written, and what does it."""

    usage: str
    module: str
    """The module of `vmctl` that has it, and before the dot, if there is one, the function."""
    words: tuple[int, int] = (1, 1)
    """How many words there are, at least and at most."""
    flags: Mapping[str, str] = {}
    """Options without a value, and what they set."""
    values: Mapping[str, str] = {}
    """Options with one."""


VERBS = {
    "console": Verb("id", "attach"),
    "events": Verb("[--json]", "control", (0, 0), {"--json": "as_json"}),
    "load": Verb("filename", "control"),
    "log": Verb("[brief | verbose]", "control"),
    "pause": Verb("id", "control"),
    "receive": Verb("name", "control"),
    "reload": Verb("", "control", (0, 0)),
    "reset": Verb("[all | switches | vms]", "control", (0, 1)),
    "send": Verb("id", "control"),
    "show": Verb("[-r] [--json] [id]", "status", (0, 1), {"-r": "running", "--json": "as_json"}),
    "start": Verb(
        "[-cL] [-B device] [-b path] [-d disk] [-i count]\n"
        "\t\t[-m size] [-n switch] [-p count] [-r path] [-t name]\n"
        "\t\t[--append string] [--firmware name] [--initrd path] id | name",
        "start",
        (1, 1),
        {"-c": "console", "-L": "local"},
        START_VALUES,
    ),
    "status": Verb("[-r] [--json] [id]", "status", (0, 1), {"-r": "running", "--json": "as_json"}),
    "stop": Verb(
        "[-fw] [id | -a]",
        "control",
        (0, 1),
        {"-f": "force", "-w": "wait", "-a": "every"},
    ),
    "top": Verb(
        "[--json] [-d seconds] [-n count]",
        "top",
        (0, 0),
        {"--json": "as_json"},
        {"-d": "delay", "-n": "count"},
    ),
    "unpause": Verb("id", "control"),
    "wait": Verb(
        "[--for running | stopped | console=text] [--timeout seconds] id",
        "wait",
        (1, 1),
        {},
        {"--for": "until", "--timeout": "timeout"},
    ),
}


def read_verb(arguments: Sequence[str]) -> tuple[str, Values, list[str]] | None:
    """Read a command line: verb, options by name, words; None for what has to be left to typer.

    That is: whatever is wrong, asks for help, has options in front of the verb, or is written in
    one of the rarer ways that typer takes.
    """
    name = _verb(arguments[0]) if arguments else None
    if name is None:
        return None
    verb, rest = VERBS[name], list(arguments[1:])
    values: Values = {}
    lists: dict[str, tuple[str, ...]] = {}
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        letters = [f"-{letter}" for letter in option[1:]]
        if option in verb.flags:
            letters = [option]
        elif option in verb.values and rest and not rest[0].startswith("-"):
            field = verb.values[option]
            lists[field] = (*lists.get(field, ()), rest.pop(0))
            continue
        if not letters or any(letter not in verb.flags for letter in letters):
            return None
        for letter in letters:
            field = verb.flags[letter]
            values[field] = int(values.get(field) or 0) + 1 if field == "local" else True  # type: ignore[arg-type] # of local it is a number
    if not verb.words[0] <= len(rest) <= verb.words[1] or not _fits(name, values, rest):
        return None
    for field, given in lists.items():
        values[field] = given if name == "start" else given[-1]
    return name, values, rest


def perform(name: str, values: Values, words: Sequence[str]) -> int | None:
    """Do what a verb says; returns the exit status, or None if the words make no sense."""
    from importlib import import_module  # noqa: PLC0415 - each verb loads its own module alone

    module = import_module(f"vmctl.{VERBS[name].module}")
    status: int | None
    if name == "start":
        status = module.start(module.StartOptions(**values), words)
    elif VERBS[name].words == (0, 0) and name != "reload":
        status = getattr(module, name)(**values)
    else:
        status = getattr(module, name)(words, **values)
    return status


def usage(name: str) -> str:
    """Return what is printed when a verb is misused."""
    return f"usage:\tvmctl [-v] {name} {VERBS[name].usage}".rstrip()


def _verb(word: str) -> str | None:
    matches = [name for name in (*VERBS, *OTHERS) if name.startswith(word)]
    return matches[0] if len(matches) == 1 and word and matches[0] in VERBS else None


def _fits(name: str, values: Values, words: Sequence[str]) -> bool:
    """Tell whether `stop` has an id or -a, and not both."""
    return name != "stop" or bool(values.get("every")) != bool(words)
