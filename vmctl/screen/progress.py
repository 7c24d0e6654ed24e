"""A progress bar for what takes long, on a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, size: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of further bytes, and shows them on a terminal.

    Args:
        what: is being done.
        size: of all, if it is known.
        done: bytes that were done before.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415 - only a terminal gets a bar
    from rich.progress import (  # noqa: PLC0415 - same
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        *(BarColumn(), DownloadColumn(binary_units=True)),
        *(TransferSpeedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=size, completed=done)
        yield lambda more: bar.advance(task, more)
