"""Tables for people: imported for a terminal alone, as rich costs more than all else."""

from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_RIGHT = {"ID", "PID", "VCPUS", "MAXMEM", "CURMEM", "CPU", "READ/S", "WRITE/S", "IN/S", "OUT/S"}
_STYLES = {
    "running": "green",
    "paused": "yellow",
    "waiting": "cyan",
    "stopping": "magenta",
    "stopped": "dim",
}


def make_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table; a word that is a state has its colour."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in header:
        table.add_column(
            name, justify="right" if name in _RIGHT else "left", no_wrap=True, overflow="fold"
        )
    state = header.index("STATE")
    for row in rows:
        cells = [Text(cell) for cell in row]
        cells[state].stylize(_STYLES.get(row[state], ""))
        table.add_row(*cells)
    return table


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on the terminal."""
    Console(highlight=False).print(make_table(header, rows))


class Screen:
    """A table that is drawn again and again in its place."""

    def __init__(self) -> None:
        """Begin at the cursor."""
        self._live = Live(console=Console(highlight=False), auto_refresh=False)
        self._live.start()

    def show(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Draw a table instead of the last one."""
        self._live.update(make_table(header, rows), refresh=True)

    def close(self) -> None:
        """Leave the last table where it is."""
        self._live.stop()
