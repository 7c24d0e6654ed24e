"""The pytest plugin with a Linux guest and its agent: alone, by two workers, and one killed."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import artifacts
from tests.guest.agent_guest import APPEND, initramfs
from tests.guest.linux_guest import COMMAND_LINE
from tests.system.vmd.pytest_runs import Runs, runs

__all__ = ("runs",)

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(1800)]

ALONE, SHARED = 6, 6
"""Machines for commands: of the first run, and of the workers."""
RUN_S = 800.0
TIMEOUT_S = 400.0
CLOCK_S = 60.0
"""How far a guest's clock, a second old, may be from the host's on a slow machine."""
TESTS = """
import json, os, pathlib, signal, time
import pytest

pytestmark = pytest.mark.vm(memory="256M", timeout={timeout})
told = pathlib.Path(os.environ["TOLD"])

@pytest.mark.parametrize("number", range({count}))
def test_it(vm_factory, number):
    begin = time.monotonic()
    vm = vm_factory()
    vm.succeed("true")
    seconds = time.monotonic() - begin
    random = "head -c 16 /dev/urandom | md5sum"
    identity = vm.succeed(f"cat /etc/machine-id; hostname; {{random}}; date +%s")
    vm.fail("test -e /mark")
    vm.succeed("echo mark > /mark")
    with told.open("a") as file:
        file.write(json.dumps([seconds, time.time(), identity]) + "\\n")
    if {kills} and number == {count} - 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""
MORE = """
def test_methods(vm, tmp_path):
    vm.copy_from_host(__file__, "/copy")
    vm.copy_to_host("/copy", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == pathlib.Path(__file__).read_bytes()
    vm.wait_for_file("/copy")
    with pytest.raises(AssertionError, match="exit status 3, not 0: exit 3"):
        vm.succeed("exit 3")
    vm.send_console("poweroff -f\\n")
    with pytest.raises(AssertionError, match="has ended"):
        vm.wait_for_console_text("never")

def test_that_fails(vm):
    vm.send_console("echo con''sole\\n")
    vm.wait_for_console_text("console")
    vm.succeed("echo out; exit 7")
"""


class Row(NamedTuple):
    """A line that a test has written."""

    seconds: float
    """Until a clone has run a command."""
    at: float
    identity: str


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Return the options that describe the guest."""
    kernel = artifacts.kernel("cloud")
    return [
        f"--vm-kernel={kernel.vmlinuz}",
        f"--vm-initrd={initramfs(kernel, tmp_path / 'initrd')}",
        f"--vm-append={COMMAND_LINE} {APPEND}",
    ]


def output_of(runs: Runs, text: str, *options: str) -> str:
    """Run pytest; returns its output. Nothing of the run is left."""
    with runs.start(text, *options) as process:
        try:
            output, _ = process.communicate(timeout=RUN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate(timeout=TIMEOUT_S)
    runs.wait_until_clean()
    return output


def test_with_a_linux_guest(runs: Runs, options: list[str]) -> None:
    """Each test has another machine: entropy, machine-id, host name, the host's time, no files.

    A failing test's report has the console. A worker that is killed leaves nothing.
    """
    (runs.directory / "conftest.py").unlink()
    text = TESTS.format(count=ALONE, kills=False, timeout=TIMEOUT_S) + MORE
    output = output_of(runs, text, *options)
    assert f"1 failed, {ALONE + 1} passed" in output, output
    assert "exit status 7, not 0: echo out; exit 7" in output
    assert "- Console of pytest-" in output
    assert "\nconsole" in output.partition("- Console of pytest-")[2]
    alone = rows(runs)
    times = sorted(row.seconds for row in alone)
    print(
        f"a fresh clone and a command: p50 {statistics.median(times):.2f} s, "
        f"least {times[0]:.2f}, most {times[-1]:.2f}"
    )
    text = TESTS.format(count=SHARED, kills=True, timeout=TIMEOUT_S)
    output = output_of(runs, text, *options, "-n", "2")
    assert f"1 failed, {SHARED - 1} passed" in output, output
    assert "crashed while running" in output
    found = rows(runs)
    assert len(found) == ALONE + SHARED
    identities = [row.identity.split("\n") for row in found]
    for column in range(3):
        assert len({words[column] for words in identities}) == len(found)
    for words, row in zip(identities, found, strict=True):
        assert abs(int(words[3]) - row.at) < CLOCK_S


def rows(runs: Runs) -> list[Row]:
    """Return the lines that the tests have written."""
    return [Row(*json.loads(line)) for line in runs.told.read_text().splitlines()]
