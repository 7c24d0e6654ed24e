"""What the tests of the daemon share."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.vmd.daemon import Daemon

Start = Callable[[str], Daemon]


def missing_separation() -> str | None:
    """Return why a daemon with separated processes cannot run here."""
    if os.geteuid() != 0:
        return "separated processes need root"
    try:
        pwd.getpwnam("_vmd")
    except KeyError:
        return "there is no user _vmd: scripts/setup.sh makes it"
    return None


@pytest.fixture(params=["user", "root"])
def start_vmd(request: pytest.FixtureRequest, tmp_path: Path) -> Start:
    """Return how to start a vmd with a configuration, the way that the test is run for."""
    is_user = request.param == "user"
    reason = None if is_user else missing_separation()
    if reason:
        if "root" in os.environ.get("VMD_REQUIRE", "").split(","):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return lambda config: Daemon(tmp_path, config, is_user=is_user)
