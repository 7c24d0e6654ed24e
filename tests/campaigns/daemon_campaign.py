"""Shared by campaigns against the daemon: their failure, and their command line."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


class Failure(Exception):  # noqa: N818 - of the daemon, not of the campaign
    """The daemon has a fault; `str()` says which."""


def main(
    name: str,
    description: str | None,
    options: dict[str, tuple[int, str]],
    run: Callable[[Path, argparse.Namespace], str],
) -> int:
    """Run a campaign in a directory of its own; returns the exit status.

    `options` are numbers by name, each with its default and its meaning. `run` returns a line to
    print, and raises Failure.
    """
    parser = argparse.ArgumentParser(prog=name, description=description)
    for option, (default, meaning) in options.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=meaning)
    given = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as directory:
        try:
            told = run(Path(directory), given)
        except (Failure, OSError, AssertionError) as err:
            print(f"{name}: {' '.join(sys.argv[1:])}: {err}", file=sys.stderr)
            return 1
    print(f"{told}; {time.monotonic() - begun:.0f} s")
    return 0
