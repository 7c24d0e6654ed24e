"""Parts of the campaigns of corrupted images and of killed writers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SEED = os.environ.get("VMM_FUZZ_SEED", "1")
COUNT = os.environ.get("VMM_FUZZ_COUNT", "60")


def campaign(name: str, count: str) -> str:
    """Run a campaign in a process of its own; return its output."""
    done = subprocess.run(
        [sys.executable, f"tests/campaigns/{name}.py", "--count", count, "--seed", SEED],
        check=False,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("qemu_img")
def test_corrupted_images() -> None:
    """A corrupted image is used, or refused in one line."""
    assert campaign("corrupt_images", COUNT).endswith(" 0 deviations\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("qemu_img")
def test_killed_writers() -> None:
    """A killed writer leaves a sound image with all flushed data."""
    assert campaign("kill_disk", "4").endswith(" 0 deviations\n")
