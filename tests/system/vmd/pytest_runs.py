"""Runs of pytest with the plugin, in a directory of their own, and checks for leftovers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.agents import wait_until
from tests.system.vmd.daemon import ROOT, SELFTEST, is_alive

CONFTEST = f"""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, {str(ROOT)!r})
from tests.agents import CLONES_AGENT, HostAgent

pytestmark = pytest.mark.vm(kernel={str(SELFTEST)!r}, memory="16M")

@pytest.fixture(scope="session")
def vm_agent(tmp_path_factory):
    with HostAgent(tmp_path_factory.mktemp("agent") / "agent", program=CLONES_AGENT) as host:
        yield lambda name: host.agent
"""
_RUN_S = 110.0
"""Less than pytest gives a test: many processes start, on a busy machine."""
HEADER = f"""
import os, subprocess, sys, time
import pytest
pytestmark = pytest.mark.vm(kernel={str(SELFTEST)!r}, memory="16M")
"""


class Runs:
    """Runs of pytest in a directory; leftovers are reported."""

    def __init__(self, directory: Path) -> None:
        """Prepare the directory."""
        self.directory = directory
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self.told = directory / "told"
        (directory / "pytest.ini").write_text("[pytest]\n")
        (directory / "conftest.py").write_text(CONFTEST)
        self.of_agent = {"TOLD": str(self.told), "REFUSES": str(directory / "refuses")}
        self.environ = {
            **{name: value for name, value in os.environ.items() if "PYTEST" not in name},
            "TMPDIR": str(self.temporary),
            **self.of_agent,
        }

    def start(
        self, text: str, *options: str, through: Sequence[str] = (), **environ: str
    ) -> subprocess.Popen[str]:
        """Start pytest with a test module; `through` are words before its command."""
        (self.directory / "test_it.py").write_text(HEADER + text)
        return subprocess.Popen(
            [*through, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
            cwd=self.directory,
            env={**self.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self, text: str, *options: str, through: Sequence[str] = (), **environ: str
    ) -> tuple[int, str]:
        """Run pytest with a test module; returns its exit status and its output."""
        with self.start(text, *options, through=through, **environ) as process:
            output, _ = process.communicate(timeout=_RUN_S)
            return process.returncode, output

    def processes(self, argument: bytes = b"") -> list[int]:
        """Return the processes of these runs; with `argument` those that have it."""
        wanted = f"TMPDIR={self.temporary}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = wanted in (path / "environ").read_bytes()
                arguments = (path / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            if is_ours and (not argument or argument in arguments) and is_alive(int(path.name)):
                found.append(int(path.name))
        return found

    def folders(self) -> list[str]:
        """Return the folders of runs that are there."""
        return [path.name for path in self.temporary.glob("vmm-pytest-*")]

    def wait_until_clean(self) -> None:
        """Wait until neither a process nor a folder is left."""
        wait_until(lambda: not self.processes() and not self.folders())


@pytest.fixture
def runs() -> Iterator[Runs]:
    """Yield where pytest runs; the test fails if a run leaves something behind."""
    with TemporaryDirectory(prefix="vmm-") as directory:
        runs = Runs(Path(directory))
        yield runs
        runs.wait_until_clean()
