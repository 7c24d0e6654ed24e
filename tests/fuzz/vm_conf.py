"""Fuzz target: vm.conf, as `vmd -nv` reads it.

vmd accepts it, or refuses it in lines that a terminal can show; an accepted file, written out and
read again, says the same.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tests.campaigns.mutate_configs import NAME, read
from tests.unit.config.fake_host import directory

CONFIGS = Path(__file__).resolve().parents[1] / "config"


@cache
def _files() -> dict[str, bytes]:
    return directory(CONFIGS)


def run(data: bytes) -> None:
    """Read a file, which may include the tests' files."""
    read({**_files(), NAME: data})


def seeds() -> list[bytes]:
    """Return the files of the tests."""
    return [data for name, data in sorted(_files().items()) if name.endswith(".conf")]
