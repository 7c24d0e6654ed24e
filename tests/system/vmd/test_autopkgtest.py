"""Debian's autopkgtest itself, with our server: a source package's tests on two testbeds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.vmd.daemon import ROOT
from tests.system.vmd.pytest_runs import Runs, runs
from tests.two_tests import check_results, source_package

__all__ = ("runs",)

RUN_S = 250
PROGRAM = shutil.which("autopkgtest")


@pytest.mark.kvm
@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(PROGRAM is None, reason="autopkgtest is not installed")
def test_a_source_package(runs: Runs, tmp_path: Path) -> None:
    """Two tests pass, the second on a testbed without a trace of the first; nothing is left."""
    result, testbeds = tmp_path / "result", tmp_path / "testbeds"
    done = subprocess.run(
        [
            *(str(PROGRAM), "--no-built-binaries", "-o", result),
            *(f"{source_package(tmp_path / 'source')}/", "--"),
            *(sys.executable, ROOT / "tests" / "autopkgtest_server.py"),
        ],
        env={**runs.environ, "TESTBEDS": str(testbeds)},
        capture_output=True,
        text=True,
        check=False,
        timeout=RUN_S,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    check_results(result)
    names = testbeds.read_text().split()
    assert len(names) == len(set(names)) == 2
    assert not Path("/root/mark").exists()
    runs.wait_until_clean()
