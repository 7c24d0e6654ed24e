"""The two readings of every command line agree: ours, and typer's of the same table of verbs."""

from __future__ import annotations

import pytest
import typer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmctl.daemon.start import StartOptions
from vmctl.foreground.run import RunOptions
from vmctl.line.cli import UsageError, Values, read
from vmctl.line.declaration import make_app
from vmctl.line.verbs import VERBS, Verb
from vmctl.values import VmOptions

_ODD = (
    *("-x", "-", "--", "", "web", "256M", "--append=a=b", "--initrd=", "--no-reboot=1", "-m256M"),
    *("-m=1", "-cL", "-LLc", "-fw", "--init", "console=ttyS0 quiet", "disk.qcow2,ro", "-1"),
)

Reading = tuple[str, Values, list[str]]


def _by_typer(arguments: list[str]) -> Reading | None:
    """Return typer's reading of a command line; None if it refuses it."""
    seen: list[Reading] = []

    def remember(verb: Verb, given: dict[str, object]) -> None:
        words = given.pop("words", None)
        values: Values = {}
        for option in verb.taken:
            value = given[option.field]
            if value:
                assert isinstance(value, bool | int | str | list)
                values[option.field] = tuple(value) if isinstance(value, list) else value
            elif option.value and not option.is_repeated and value is not None:
                values[option.field] = ""
        seen.append((verb.name, values, list(words) if isinstance(words, list) else []))

    command = typer.main.get_command(make_app(remember))
    try:
        command.main(arguments, prog_name="vmctl", standalone_mode=False)
    except typer.TyperException:
        return None
    return seen[0] if seen else None


def _by_us(arguments: list[str]) -> Reading | None:
    try:
        found = read(arguments)
    except UsageError:
        return None
    return found.verb.name, found.values, found.words


@st.composite
def _lines(draw: st.DrawFn) -> list[str]:
    """Return a command line of a verb, with options of its own and some that fit nowhere."""
    verb = VERBS[draw(st.sampled_from(sorted(VERBS)))]
    options = [option.name for option in verb.taken]
    words = draw(st.lists(st.sampled_from((*options, *options, *_ODD)), max_size=7))
    return [*verb.name.split(), *words]


@given(_lines())
@example(["start", "-d", "-d", "x"])
@example(["run", "-Lc", "-m", "--", "--", "web"])
@example(["image", "resize", "-"])
@settings(max_examples=400)
def test_both_readings_agree(line: list[str]) -> None:
    """For any command line both readings agree, or both refuse it."""
    ours, typers = _by_us(line), _by_typer(line)
    verb = VERBS[line[0] if line[0] in VERBS else " ".join(line[:2])]
    if ours is None and typers is not None and not verb.least <= len(typers[2]) <= verb.most:
        return  # typer knows whether an operand must be there; only we know how many may be
    if ours and verb.behind in ours[1]:  # which are words to typer, as all others
        command = ours[1].pop(verb.behind)
        assert isinstance(command, tuple)
        ours = ours[0], ours[1], [*ours[2], *command]
    assert ours == typers


@pytest.mark.parametrize("name", sorted(VERBS))
def test_every_option_is_understood(name: str) -> None:
    """Each option alone, with a value if it has one, is read as the table says."""
    words = ["x"] * VERBS[name].least
    for option in VERBS[name].taken:
        line = [*name.split(), option.name, *(["value"] if option.value else []), *words]
        value: bool | int | str | tuple[str, ...]
        value = "value" if option.value else True
        if option.is_repeated:
            value = (value,) if isinstance(value, str) else 1
        assert _by_us(line) == _by_typer(line) == (name, {option.field: value}, words)


@pytest.mark.parametrize(("name", "options"), [("run", RunOptions), ("start", StartOptions)])
def test_records_have_the_fields_of_the_table(
    name: str, options: type[RunOptions | StartOptions]
) -> None:
    """A long verb is read as a record with the table's fields."""
    fields = {option.field for option in VERBS[name].taken}
    named = {*options.__annotations__, *VmOptions.__annotations__}
    # Options for the output of every verb are no part of the record.
    assert named - {"name", "as_json"} == fields - {"as_json"}


def test_values_joined_and_not() -> None:
    """A value may be joined to its option, and may begin with a dash; -- ends options."""
    assert _by_us(["run", "-m256M"]) == ("run", {"memory": ("256M",)}, [])
    assert _by_us(["run", "--append=-x"]) == ("run", {"append": ("-x",)}, [])
    assert _by_us(["run", "--append", "--no-reboot"]) == ("run", {"append": ("--no-reboot",)}, [])
    assert _by_us(["console", "--", "--no-reboot"]) == ("console", {}, ["--no-reboot"])
    assert _by_us(["run", "--", "--no-reboot"]) == ("run", {"command": ("--no-reboot",)}, [])
    assert _by_us(["start", "-LcL", "-n", "a", "-nb", "x"]) == (
        "start",
        {"local": 2, "console": True, "switches": ("a", "b")},
        ["x"],
    )


def test_options_behind_operands() -> None:
    """Tools for old releases of OpenBSD write the name first; after -- there is no option."""
    wanted = {"boot": ("kernel",), "console": True}
    for line in ("web -b kernel -c", "-b kernel web -c", "-b kernel -c -- web"):
        words = ["start", *line.split()]
        assert _by_us(words) == _by_typer(words) == ("start", wanted, ["web"])
    words = ["wait", "web", "--", "-c"]
    assert _by_us(words) is None
