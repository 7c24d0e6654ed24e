"""The command line as typer declares it, made from the table of verbs, for help on a terminal.

Importing typer costs more than the rest of a short command: this module is loaded only for help on
a terminal.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from vmctl.line.options import Option
from vmctl.line.verbs import VERBS, Verb

_SETTINGS = {"help_option_names": ["-h", "--help"]}
Perform = Callable[[Verb, dict[str, object]], None]
"""Executes a verb with the given options, by field, and `words`."""


def make_app(perform: Perform = lambda _verb, _given: None) -> typer.Typer:
    """Return the command line as typer has it; each command calls `perform`."""
    app = _group("vmctl", "Control virtual machines.")

    @app.callback()
    def options(
        _verbose: Annotated[bool, typer.Option("-v", help="Log what happens, in detail.")] = False,
        _version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    ) -> None:
        """Control virtual machines."""

    groups: dict[str, typer.Typer] = {}
    for name, verb in VERBS.items():
        first, _, second = name.partition(" ")
        if not second:
            app.command(first, context_settings=_SETTINGS)(_command(verb, perform))
            continue
        if first not in groups:
            groups[first] = _group(first, "Get, describe, check and resize disk images.")
            app.add_typer(groups[first])
        groups[first].command(second, context_settings=_SETTINGS)(_command(verb, perform))
    return app


def show_help(words: Sequence[str]) -> None:
    """Print the help of the verb that `words` name in full, or of all."""
    command = typer.main.get_command(make_app())
    command.main([*words, "--help"], prog_name="vmctl", standalone_mode=False)


def _group(name: str, text: str) -> typer.Typer:
    return typer.Typer(
        name=name,
        help=text,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings=_SETTINGS,
    )


def _command(verb: Verb, perform: Perform) -> Callable[..., None]:  # type: ignore[explicit-any] # typer calls it by its signature
    """Return a function whose signature is the verb's options and words."""

    def command(**given: object) -> None:
        perform(verb, given)

    command.__doc__ = verb.help
    parameters = [_option(option) for option in verb.taken]
    if verb.least:
        words = typer.Argument(metavar=verb.words, show_default=False)
        parameters.append(_parameter("words", list[str], words, default=inspect.Parameter.empty))
    elif verb.most:
        words = typer.Argument(metavar=verb.words, show_default=False)
        parameters.append(_parameter("words", list[str] | None, words))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # typer's way in
    return command


def _option(option: Option) -> inspect.Parameter:
    kind: object
    if option.value:
        declared = typer.Option(option.name, metavar=option.value, help=option.help)
        kind = list[str] | None if option.is_repeated else str | None
        return _parameter(option.field, kind, declared)
    declared = typer.Option(
        option.name, help=option.help, count=option.is_repeated, show_default=False
    )
    if option.is_repeated:
        return _parameter(option.field, int, declared, default=0)
    return _parameter(option.field, bool, declared, default=False)


def _parameter(
    name: str, kind: object, declared: object, default: object = None
) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, declared],
    )
