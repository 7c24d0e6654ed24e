"""The command line: parsed by the table of verbs, and executed by the verb's function.

Options come before operands or behind them, as tools for OpenBSD before 6.5 write them (`start web
-c`), and end at `--`. Only the modules of one verb are imported: typer shows help on a terminal,
for users, from the same table (`vmctl.line.declaration`); tests compare both readings of a command
line.

Source: section 3.1 of OpenBSD's behaviour.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from vmctl.line.options import Option
from vmctl.line.verbs import GLOBAL_USAGE, VERBS, Verb, matches, names, usage

EXIT_ERROR = 1

_HELP = ("-h", "--help")
_VERSION = Verb("--version", "", "Print the version.", "line.help", "show_version", (), 0, 0)
_REMOTE = Verb("-H", "host command", "Run vmctl at a host, by ssh.", "line.remote", "remote")

Value = bool | int | str | tuple[str, ...]
Values = dict[str, Value]


class UsageError(Exception):
    """An invalid command line; `str()` has the lines for standard error."""


class Invocation:
    """Settings of a command line."""

    __slots__ = ("is_verbose", "values", "verb", "words")

    def __init__(
        self,
        verb: Verb,
        values: Values,
        words: list[str],
        is_verbose: bool = False,
    ) -> None:
        self.verb = verb
        self.values = values
        """Values of the given options, by their fields."""
        self.words = words
        self.is_verbose = is_verbose


def main(
    arguments: Sequence[str] | None = None, on_loaded: Callable[[], None] = lambda: None
) -> int:
    """Execute a command line; returns the exit status, which is 1 for misuse.

    `on_loaded` is called when the verb's module is loaded, before it runs.
    """
    try:
        invocation = read(sys.argv[1:] if arguments is None else arguments)
        if invocation.is_verbose:
            _log_everything()
        return _perform(invocation, on_loaded)
    except UsageError as err:
        from vmm_kvm.text import printable  # noqa: PLC0415 - not for a command line that is right

        print(printable(str(err), kept="\n\t"), file=sys.stderr)
        return EXIT_ERROR


def read(arguments: Sequence[str]) -> Invocation:
    """Read a command line. One that asks for help is an invocation of the verb `help`.

    Raises:
        UsageError: it makes no sense.
    """
    rest = list(arguments)
    is_verbose = False
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option in _HELP:
            return Invocation(VERBS["help"], {}, [])
        if option == "--version":
            return Invocation(_VERSION, {}, [])
        letters = option[1:].lstrip("v")
        is_verbose = is_verbose or option.startswith("-v")
        if letters.startswith("H"):
            host = letters[1:] or (rest.pop(0) if rest else "")
            if not host:
                raise UsageError(f"vmctl: option '-H' requires an argument\n{GLOBAL_USAGE}")
            return _at_host(host, ["-v"] * is_verbose, rest)
        if letters or option == "-":
            raise UsageError(f"vmctl: no such option: {option}\n{GLOBAL_USAGE}")
    if not rest:
        raise UsageError(GLOBAL_USAGE)
    name, rest = resolve(rest)
    if name not in VERBS:
        if rest:
            return Invocation(VERBS["help"], {}, [name])
        raise UsageError(_group_usage(name))
    values, words = read_options(VERBS[name], rest)
    if values is None:
        return Invocation(VERBS["help"], {}, name.split())
    if not VERBS[name].least <= len(words) <= VERBS[name].most:
        raise UsageError(usage(VERBS[name]))
    return Invocation(VERBS[name], values, words, is_verbose)


def _at_host(host: str, options: list[str], words: list[str]) -> Invocation:
    """Return what runs vmctl at a host; it reads the words behind the verb there."""
    while words and words[0].startswith("-"):
        options.append(words.pop(0))
    verb = resolve(words)[0] if words else ""
    return Invocation(_REMOTE, {}, [host, verb, *options, *words])


def resolve(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of the verb that `words` begin with, perhaps shortened, and the other words.

    Where a word begins several verbs, as `image` does, and no other but an option for help follows,
    it is returned itself.

    Raises:
        UsageError: no verb can be meant, or several.
    """
    first = _find(words[0], names(), GLOBAL_USAGE)
    behind = list(words[1:])
    if first in VERBS or not behind or behind[0] in _HELP:
        return first, behind
    second = _find(behind[0], names(first), _group_usage(first))
    return f"{first} {second}", behind[1:]


def _group_usage(word: str) -> str:
    return "\n".join(usage(verb) for name, verb in VERBS.items() if name.startswith(f"{word} "))


def _find(word: str, known: Mapping[str, bool], explanation: str) -> str:
    """Return the name in `known` that `word` abbreviates."""
    found = matches(word, known)
    if len(found) == 1:
        return found[0]
    lines = [f"{'ambiguous' if found else 'unknown'} argument: {word}"]
    if not found:
        lines += _suggestion(word, known)
    raise UsageError("\n".join((*lines, explanation)))


def read_options(verb: Verb, words: Sequence[str]) -> tuple[Values | None, list[str]]:
    """Read the options of a verb; returns their values, or None for help, and the words behind.

    Raises:
        UsageError: an option is unknown, or has no value where it needs one or one too many.
    """
    known = {option.name: option for option in verb.options}
    values: Values = {}
    rest, operands = list(words), list[str]()
    while rest:
        word = rest.pop(0)
        if word == "--":
            if verb.behind and rest:
                values[verb.behind] = tuple(rest)
                return values, operands
            break
        if word == "-" or not word.startswith("-"):
            operands.append(word)
            continue
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            option = _option(verb, name, known)
            if option is None:
                return None, []
            if equals and not option.value:
                raise _misuse(verb, f"option '{name}' does not take a value")
            _set(values, option, value if equals else _value(verb, option, rest))
            continue
        letters = word[1:]
        while letters:
            option = _option(verb, f"-{letters[0]}", known)
            if option is None:
                return None, []
            letters = letters[1:]
            if option.value and letters:
                _set(values, option, letters)
                break
            _set(values, option, _value(verb, option, rest))
    return values, operands + rest


def _option(verb: Verb, name: str, known: Mapping[str, Option]) -> Option | None:
    """Return the option of this name, or None if it is that for help."""
    if name in known:
        if known[name].refused:
            raise UsageError(f"vmctl: {name} is not for {verb.name}: {known[name].refused}")
        return known[name]
    if name in _HELP:
        return None
    raise _misuse(verb, f"no such option: {name}", _suggestion(name, known))


def _value(verb: Verb, option: Option, rest: list[str]) -> str:
    """Take an option's value from the following words; a flag has none."""
    if not option.value:
        return ""
    if not rest:
        raise _misuse(verb, f"option '{option.name}' requires an argument")
    return rest.pop(0)


def _set(values: Values, option: Option, value: str) -> None:
    before = values.get(option.field)
    if option.value and option.is_repeated:
        values[option.field] = (*(before if isinstance(before, tuple) else ()), value)
    elif option.value:
        values[option.field] = value
    elif option.is_repeated:
        values[option.field] = (before if isinstance(before, int) else 0) + 1
    else:
        values[option.field] = True


def _misuse(verb: Verb, problem: str, hint: Iterable[str] = ()) -> UsageError:
    return UsageError("\n".join((f"vmctl: {problem}", *hint, usage(verb))))


def _perform(invocation: Invocation, on_loaded: Callable[[], None]) -> int:
    from importlib import import_module  # noqa: PLC0415 - not for a command line that is wrong

    module = import_module(f"vmctl.{invocation.verb.module}")
    on_loaded()
    status: int | None
    status = getattr(module, invocation.verb.function)(invocation.words, **invocation.values)
    if status is None:
        raise UsageError(usage(invocation.verb))
    return status


def _log_everything() -> None:
    from vmm_kvm.log import show_lines  # noqa: PLC0415 - most commands log nothing

    show_lines("vmctl", "DEBUG")


# Typing errors


def _suggestion(word: str, known: Iterable[str]) -> list[str]:
    """Return a line with the likely word, if one is nearer than all others."""
    rated = sorted((_distance(word, name), name) for name in known)
    nearest, name = rated[0] if rated else (len(word), "")
    is_alone = len(rated) < 2 or rated[1][0] > nearest
    return [f"did you mean {name}?"] if is_alone and nearest <= min(2, len(word) // 2) else []


def _distance(one: str, other: str) -> int:
    """Return how many letters must be changed, removed, inserted or swapped with the next."""
    rows = [list(range(len(other) + 1))]
    for i, letter in enumerate(one):
        row = [i + 1]
        for j, wanted in enumerate(other):
            best = min(rows[i][j] + (letter != wanted), rows[i][j + 1] + 1, row[j] + 1)
            if i and j and letter == other[j - 1] and one[i - 1] == wanted:
                best = min(best, rows[i - 1][j - 1] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]
