"""Loggers of the standard library that cost nothing until they have something to say.

Importing `logging` would take a fifth of the time that `vmctl run` needs before its guest runs, and
most starts log nothing.
"""

import sys
from collections.abc import Callable

from vmm_kvm.text import printable

_set_up: Callable[[], None] | None = None


def set_up_with(function: Callable[[], None]) -> None:
    """Call `function` once, when the first message of this process is about to be logged.

    It configures `logging` as the program wants it. A program that wants debugging messages
    imports and configures `logging` itself, before it does anything else.
    """
    global _set_up  # noqa: PLW0603 - one per process, as logging's own configuration is
    _set_up = function


def show_lines(program: str, level: str) -> None:
    """Show messages of at least `level`, such as `DEBUG`, on standard error: each is one line.

    Nothing changes where that has been done before.
    """
    import logging  # noqa: PLC0415 - see the module's docstring

    class _Lines(logging.Formatter):
        def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
            record.message = printable(record.message)
            return super().formatMessage(record)

    handler = logging.StreamHandler()
    handler.setFormatter(_Lines(f"{program}: %(message)s"))
    logging.basicConfig(handlers=[handler], level=level)


class Log:
    """The result of `logging.getLogger(name)`, as far as this package uses it; any thread.

    Messages are lines without a newline; arguments are formatted into them as `%` does, and only
    if the message is wanted.
    """

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        """Name the logger, by its module."""
        self._name = name

    def debug(self, message: str, *arguments: object) -> None:
        """Log a detail for diagnosis, if `logging` has been set up for this level."""
        if "logging" in sys.modules:
            self._log("DEBUG", message, arguments)

    def info(self, message: str, *arguments: object) -> None:
        """Log an event, if `logging` has been set up for this level."""
        if "logging" in sys.modules:
            self._log("INFO", message, arguments)

    def warning(self, message: str, *arguments: object) -> None:
        """Log a message for the user."""
        self._log("WARNING", message, arguments)

    def error(self, message: str, *arguments: object) -> None:
        """Log what failed."""
        self._log("ERROR", message, arguments)

    def exception(self, message: str, *arguments: object) -> None:
        """Log a bug of ours, with the traceback of the exception that is being handled."""
        self._log("ERROR", message, arguments, exc_info=True)

    def _log(
        self, level: str, message: str, arguments: tuple[object, ...], *, exc_info: bool = False
    ) -> None:
        import logging  # noqa: PLC0415 - what this module is for

        global _set_up
        if _set_up is not None:
            function, _set_up = _set_up, None
            function()
        number = logging.getLevelNamesMapping()[level]
        logging.getLogger(self._name).log(
            number, message, *arguments, exc_info=exc_info or None, stacklevel=3
        )
