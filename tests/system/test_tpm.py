"""A TPM by swtpm: its kept state, its exclusive use, and its end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import tpm_commands as tpm
from tests.vmctl_driver import VMCTL, ConsoleProcess, vmctl_run
from vmctl.foreground.tpm import start_swtpm
from vmm_kvm.errors import SpecError
from vmm_kvm.swtpm import Swtpm, SwtpmError

pytestmark = pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")

SECRET = b"swordfish"
DEADLINE_S = 30.0
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def started(directory: Path) -> Iterator[Swtpm]:
    """Start a TPM, as a machine that is switched on does."""
    with ExitStack() as stack:
        found = start_swtpm(str(directory), stack)
        found.power_on()
        assert tpm.code(found.execute(tpm.STARTUP)) == 0
        yield found


def processes(directory: Path) -> list[int]:
    """Return the swtpm processes that use a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"dir={directory},mode=0600".encode() in words:
            found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for another process."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_kept(tmp_path: Path) -> None:
    """A secret survives a reset and the process, and is not in another directory."""
    with started(tmp_path / "one") as one:
        first, second = (tpm.data(one.execute(tpm.get_random(16))) for _ in range(2))
        assert len(first) == len(second) == 16
        assert first != second
        assert tpm.code(one.execute(tpm.define(len(SECRET)))) == 0
        assert tpm.code(one.execute(tpm.write(SECRET))) == 0
        one.power_on()  # the machine is reset
        assert tpm.code(one.execute(tpm.read(len(SECRET)))) == 0x100  # not started yet
        assert tpm.code(one.execute(tpm.STARTUP)) == 0
        assert tpm.data(one.execute(tpm.read(len(SECRET)))) == SECRET
    assert processes(tmp_path / "one") == []
    with started(tmp_path / "one") as one:
        assert tpm.data(one.execute(tpm.read(len(SECRET)))) == SECRET
    with started(tmp_path / "two") as two:
        assert tpm.code(two.execute(tpm.read(len(SECRET)))) != 0
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o700


def test_one_vm_at_a_time(tmp_path: Path) -> None:
    """A second VM is refused, and the first runs on."""
    with started(tmp_path / "tpm") as first:
        with ExitStack() as stack:
            second = start_swtpm(str(tmp_path / "tpm"), stack)
            with pytest.raises(SwtpmError, match="another VM has it"):
                second.power_on()
        assert tpm.code(first.execute(tpm.get_random(8))) == 0


def test_a_tpm_that_is_killed(tmp_path: Path) -> None:
    """Every command fails with one line, and cancelling does no harm."""
    with started(tmp_path / "tpm") as found:
        (pid,) = processes(tmp_path / "tpm")
        os.kill(pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(SwtpmError) as caught:
                found.execute(tpm.get_random(8))
            assert "\n" not in str(caught.value)
            found.cancel()
        with pytest.raises(SwtpmError):
            found.power_on()


def test_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, a directory in none, a comma, and a host without swtpm."""
    (tmp_path / "file").write_bytes(b"")
    for name, message in (
        ("file", "File exists"),
        ("no/where", "No such file or directory"),
        ("a,mode=0777", "swtpm takes no comma in a path"),
    ):
        with ExitStack() as stack, pytest.raises(SpecError, match=message):
            start_swtpm(str(tmp_path / name), stack)
    monkeypatch.setenv("PATH", str(tmp_path))
    with ExitStack() as stack, pytest.raises(SpecError, match="swtpm is not installed"):
        start_swtpm(str(tmp_path / "tpm"), stack)


def test_it_ends_with_a_program_that_is_killed(tmp_path: Path) -> None:
    """Also while it executes a command, when swtpm 0.7 does not notice the end of its sockets."""
    program = f"""
import os, signal
from contextlib import ExitStack
from tests import tpm_commands as tpm
from vmctl.foreground.tpm import start_swtpm
found = start_swtpm({str(tmp_path / "tpm")!r}, ExitStack())
found.power_on()
found.execute(tpm.STARTUP)
found._data.sendall(tpm.SELF_TEST)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: processes(tmp_path / "tpm") == [])


@pytest.mark.kvm
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_vm(number: signal.Signals, tmp_path: Path) -> None:
    """However vmctl ends; and a reset of the guest keeps it."""
    arguments = vmctl_run("--selftest", "--tpm", tmp_path / "tpm", "--timeout", "60")
    with ConsoleProcess(arguments) as vm:
        vm.expect("selftest: ready", DEADLINE_S)
        (pid,) = processes(tmp_path / "tpm")
        vm.send("r")
        vm.expect("self-test guest", DEADLINE_S)
        vm.expect("selftest: ready", DEADLINE_S)
        assert processes(tmp_path / "tpm") == [pid]
        vm.signal(number)
        vm.wait()
    wait_until(lambda: processes(tmp_path / "tpm") == [])


@pytest.mark.kvm
def test_a_vm_beside_another(tmp_path: Path) -> None:
    """With the directory of one that runs it does not start: one line, status 1."""
    with started(tmp_path / "tpm"):
        done = subprocess.run(
            [VMCTL, "run", "--selftest", "--tpm", tmp_path / "tpm"],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    assert done.returncode == 1
    assert re.fullmatch(r"vmctl: swtpm cannot use its state: another VM .*\n", done.stderr)
