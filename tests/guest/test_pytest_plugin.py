"""The pytest plugin with a Linux guest and its agent: many tests, two workers, and a killed one."""

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

COUNT = 24
RUN_S = 700.0
TIMEOUT_S = 400.0
CLOCK_S = 60.0
"""How far a guest's clock, a second old, may be from the host's on a slow machine."""
TESTS = """
import json, os, pathlib, signal, time
import pytest

told = pathlib.Path(os.environ["TOLD"])

@pytest.mark.parametrize("number", range({count}))
def test_it(vm_factory, number):
    begin = time.monotonic()
    vm = vm_factory()
    ready = time.monotonic()
    vm.succeed("true")
    end = time.monotonic()
    random = "head -c 16 /dev/urandom | md5sum"
    identity = vm.succeed(f"cat /etc/machine-id; hostname; {{random}}; date +%s")
    vm.fail("test -e /mark")
    vm.succeed("echo mark > /mark")
    with told.open("a") as file:
        file.write(json.dumps([end - begin, ready - begin, time.time(), identity]) + "\\n")
    if {kills} and number == {count} - 3:
        os.kill(os.getpid(), signal.SIGKILL)

def test_ends(vm):
    vm.send_console("echo con''sole\\n")
    vm.wait_for_console_text("console")
    vm.copy_from_host(__file__, "/copy")
    vm.copy_to_host("/copy", told.parent / f"back-{{vm.name}}")
    vm.wait_for_file("/copy")
    with pytest.raises(AssertionError, match="exit status 3, not 0: exit 3"):
        vm.succeed("exit 3")
    vm.send_console("poweroff -f\\n")
    with pytest.raises(AssertionError, match="has ended"):
        vm.wait_for_console_text("never", timeout={timeout})
"""


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Return the options that describe the guest."""
    kernel = artifacts.kernel("cloud")
    place = initramfs(kernel, tmp_path / "initrd")
    return [
        *(f"--vm-kernel={kernel.vmlinuz}", f"--vm-initrd={place}"),
        f"--vm-append={COMMAND_LINE} {APPEND}",
    ]


class Row(NamedTuple):
    """A line that a test has written."""

    whole: float
    """Seconds until a clone has run a command."""
    clone: float
    """Seconds until it is ready."""
    at: float
    identity: str


def told(runs: Runs) -> list[Row]:
    """Return the lines that the tests have written."""
    return [Row(*json.loads(line)) for line in runs.told.read_text().splitlines()]


def test_with_a_linux_guest(runs: Runs, options: list[str]) -> None:
    """Each test has another machine: entropy, machine-id, host name, the host's time, no files."""
    (runs.directory / "conftest.py").unlink()
    mark = f"pytestmark = pytest.mark.vm(memory='192M', timeout={TIMEOUT_S})\n"
    for words, kills in (((), False), (("-n", "2"), True)):
        count = COUNT if not kills else COUNT // 2
        text = TESTS.format(count=count, kills=kills, timeout=TIMEOUT_S) + mark
        with runs.start(text, *options, *words) as process:
            try:
                output, _ = process.communicate(timeout=RUN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate(timeout=TIMEOUT_S)
        assert f"{count + 1 - kills} passed" in output, output
        assert ("1 failed" in output) == kills
        runs.wait_until_clean()
    rows = told(runs)
    assert len(rows) == COUNT + COUNT // 2
    identities = [row.identity.split("\n") for row in rows]
    for column in range(3):
        assert len({words[column] for words in identities}) == len(rows)
    assert all(
        abs(int(words[3]) - row.at) < 60 for words, row in zip(identities, rows, strict=True)
    )
    alone = rows[:COUNT]
    for what, times in (
        ("clone and succeed", sorted(row.whole for row in alone)),
        ("clone", sorted(row.clone for row in alone)),
    ):
        print(
            f"{what}: p50 {1000 * statistics.median(times):.0f} ms, "
            f"least {1000 * times[0]:.0f}, most {1000 * times[-1]:.0f}"
        )
