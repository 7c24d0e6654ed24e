"""Dying of a signal, after restoring changes.

By default a command dies of SIGINT, SIGTERM, SIGHUP and SIGQUIT at once, silently. While a
terminal is raw or a file half written, they raise an exception in the main thread, which cleans up
as for any error; then the signal kills the process.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class _SignalledError(BaseException):
    """A signal has come."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Leave:
    """A handler that raises."""

    def __init__(self, caught: list[signal.Signals]) -> None:
        self._caught = caught

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        for each in self._caught:
            signal.signal(each, signal.SIG_IGN)  # no second one disturbs the way out
        raise _SignalledError(number)


@contextmanager
def cleaning_up() -> Iterator[None]:
    """Leave the block by an exception when a signal comes, and die of that signal behind it.

    Behind the outer block, if one is in another. Signals that are ignored, as with `nohup`, stay
    so. Only for the main thread.
    """
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    leave = _Leave(caught)
    for number in caught:
        signal.signal(number, leave)
    try:
        yield
    except _SignalledError as err:
        if isinstance(before[signal.Signals(err.number)], _Leave):
            raise
        signal.signal(err.number, signal.SIG_DFL)
        os.kill(os.getpid(), err.number)
    finally:
        for number in caught:
            signal.signal(number, before[number])
