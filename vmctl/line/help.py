"""`vmctl help`, `--help` and `--version`.

On a terminal typer formats it; elsewhere it is plain and cheap.
"""

import sys
from collections.abc import Sequence

from vmctl.line.cli import resolve
from vmctl.line.verbs import GLOBAL_USAGE, VERBS, Verb, usage

_WIDTH = 24  # of the left column


def show_version(_words: Sequence[str] = ()) -> int:
    """Print the version of this program."""
    from vmm_kvm.version import version  # noqa: PLC0415 - only for this

    print(f"vmctl {version()}")
    return 0


def show_help(words: Sequence[str] = ()) -> int | None:
    """Print the list of commands, or the usage of the one that `words` name."""
    name, behind = resolve(words) if words else ("", [])
    if behind:
        return None
    if sys.stdout.isatty():
        from vmctl.line.declaration import show_help as show  # noqa: PLC0415 - only on a terminal

        show(name.split())
    else:
        print(help_text(name), end="")
    return 0


def help_text(name: str = "") -> str:
    """Return the help of a verb, of those that begin with the word `name`, or of all."""
    if name in VERBS:
        return _verb_help(VERBS[name])
    lines = [] if name else [GLOBAL_USAGE, "", "Control virtual machines.", ""]
    lines += [_row(one, verb.help) for one, verb in VERBS.items() if one.startswith(name)]
    return "\n".join(lines) + "\n"


def _verb_help(verb: Verb) -> str:
    lines = [usage(verb), "", verb.help]
    if verb.taken:
        lines += ["", *(_row(f"{one.name} {one.value}".rstrip(), one.help) for one in verb.taken)]
    return "\n".join(lines) + "\n"


def _row(what: str, text: str) -> str:
    return (
        f"  {what:{_WIDTH}}{text}" if len(what) < _WIDTH else f"  {what}\n{'':{_WIDTH + 2}}{text}"
    )
