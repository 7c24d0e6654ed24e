"""A part of the campaign of mutated snapshots."""

from __future__ import annotations

import subprocess
import sys

COUNT = "400"


def test_mutated_snapshots_are_refused_in_one_line() -> None:
    """A faulty file or stream is refused in one line, in bounded memory."""
    command = (sys.executable, "tests/campaigns/mutate_snapshots.py", "--count", COUNT)
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.stdout.endswith(" 0 deviations\n"), done.stdout + done.stderr
    assert done.returncode == 0
