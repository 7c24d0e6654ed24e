"""Fixtures of the daemon's tests."""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

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


needs_separation = pytest.mark.skipif(
    missing_separation() is not None, reason=str(missing_separation())
)
"""Marks tests, or parameters of tests, whose daemon is root's."""
each_daemon = pytest.mark.parametrize(
    "is_user", [True, pytest.param(False, marks=[pytest.mark.root, needs_separation])]
)
"""Runs a test with a daemon of its user's, and with one of root's."""


def missing_networks() -> str | None:
    """Return why a daemon cannot have networks here."""
    if shutil.which("nft") is None:
        return "nft is not installed"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    return missing_separation()


def _skip(reason: str | None) -> None:
    """Skip the test if there is a reason, or fail it if root is required."""
    if reason:
        if "root" in os.environ.get("VMD_REQUIRE", "").split(","):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@pytest.fixture
def networks() -> None:
    """Skip a test on a host where networks are impossible."""
    _skip(missing_networks())


@pytest.fixture(params=["user", "root"])
def start_vmd(request: pytest.FixtureRequest, tmp_path: Path) -> Start:
    """Return a function that starts a vmd with a configuration, in each of the test's ways."""
    is_user = request.param == "user"
    _skip(None if is_user else missing_separation())
    return lambda config: Daemon(tmp_path, config, is_user=is_user)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """Return a directory that every user can enter; pytest's own are closed to others."""
    with TemporaryDirectory(prefix="vmd-") as directory:
        path = Path(directory)
        path.chmod(0o711)
        yield path
