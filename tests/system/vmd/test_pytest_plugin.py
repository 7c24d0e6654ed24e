"""The pytest plugin, in runs of pytest of its own; guests' agents are processes of this host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.agents import wait_until
from tests.system.vmd.daemon import ROOT, SELFTEST, TIMEOUT_S, Daemon
from tests.system.vmd.pytest_runs import Runs, runs

__all__ = ("runs",)

pytestmark = pytest.mark.kvm


MADE = 10
"""Machines that the next test's tests make."""


def test_a_fresh_machine_for_each_test(runs: Runs) -> None:
    """Tests share a template, and nothing else; each method has its effect."""
    status, output = runs.run(
        r"""
names = set()

@pytest.mark.parametrize("number", range(3))
def test_fresh(vm, number):
    assert vm.name not in names
    names.add(vm.name)
    vm.send_console("n")
    assert vm.wait_for_console_text(r"seconds\s+\d+").split() == ["seconds", "1"]
    with pytest.raises(TimeoutError, match="after 0.2 s: the console has not shown 'never'"):
        vm.wait_for_console_text("never", timeout=0.2)

def test_commands(vm, tmp_path):
    assert vm.succeed("echo one", "echo two") == "one\ntwo\n"
    assert vm.execute("echo out; exit 3") == (3, "out\n")
    vm.fail("exit 4")
    vm.wait_for_file(str(tmp_path))
    vm.copy_from_host(tmp_path, f"{tmp_path}/copy")
    with pytest.raises(AssertionError, match="exit status 0, and it should fail: true"):
        vm.fail("true")
    with pytest.raises(TimeoutError, match="after 0.3 s: still runs: sleep 60"):
        vm.succeed("sleep 60", timeout=0.3)
    with pytest.raises(TimeoutError, match="port 1: nothing listens"):
        vm.wait_for_open_port(1, timeout=0.1)
    with pytest.raises(AssertionError, match=r"still not 0: test -e .*/later"):
        vm.wait_until_succeeds(f"test -e {tmp_path}/later", timeout=0.3)
    (tmp_path / "later").write_text("now")
    assert vm.wait_until_succeeds(f"cat {tmp_path}/later") == "now"
    vm.copy_to_host(f"{tmp_path}/later", tmp_path / "back")
    assert (tmp_path / "back").read_text() == "now"

@pytest.fixture(scope="session")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a,b.qcow2"
    subprocess.run([sys.executable, "-m", "vmctl", "create", "-s", "4M", path], check=True)
    return path

@pytest.mark.parametrize("options", ["", ",ro"])
def test_disks(vm_factory, image, options):
    before = image.read_bytes()
    for vm in [vm_factory(image=f"{image}{options}") for _ in range(2)]:
        assert vm.wait_for_console_text("selftest: ready")
    assert image.read_bytes() == before

def test_ends(vm, vm_factory):
    other = vm_factory()
    other.send_console("p")
    with pytest.raises(AssertionError, match="the console has ended"):
        other.wait_for_console_text("never")
    vm.crash()
    with pytest.raises(AssertionError, match="no such VM"):
        vm.crash()
"""
    )
    assert "7 passed" in output, output
    assert status == 0
    told = [json.loads(line) for line in runs.told.read_text().splitlines()]
    assert [one["do"] for one in told] == ["entropy", "clock", "identity"] * MADE
    assert len({one["data"] for one in told[::3]}) == MADE
    assert len({(one["machine_id"], one["host_name"]) for one in told[2::3]}) == MADE


def test_what_a_failing_test_reports(runs: Runs) -> None:
    """The command, its status and output, and the console; machines that cannot be are one error.

    A failed test's machine is kept, with its daemon, until it is stopped as the report says. A
    clone that cannot be made another machine is not.
    """
    status, output = runs.run(
        r"""
def test_bad(vm):
    vm.send_console("n")
    vm.wait_for_console_text("\n1")
    vm.succeed("echo out; echo err >&2; exit 7")

def test_good(vm):
    vm.send_console("n")
    vm.wait_for_console_text("\n1")

@pytest.mark.vm(kernel="/none")
def test_kernel(vm): pass

@pytest.mark.vm(memory="x")
def test_memory(vm): pass

@pytest.mark.vm(colour=1)
def test_colour(vm): pass

def test_refused(vm_factory):
    with open(os.environ["REFUSES"], "w") as file:
        file.write("entropy")
    vm_factory()

def test_left(vm_run):
    from vmctl.client import Client
    with Client(vm_run.daemon) as client:
        assert sorted("template" in vm.name for vm in client.list()) == [False, True]
""",
        "--vm-keep=failed",
    )
    assert status == 1
    assert "3 failed" not in output, output
    assert "2 failed, 2 passed, 3 errors" in output, output
    assert "exit status 7, not 0: echo out; echo err >&2; exit 7\n" in output
    assert "output: out\nE       errors: err\n" in output
    assert output.count("- Console of pytest-") == 2  # test_bad's, test_refused's
    assert "\nn: count seconds\n1\n" in output
    assert "vm: /none: No such file or directory\n" in output
    assert "vmctl: invalid memory size: x" in output
    assert "vm: unknown: colour (there is image, kernel," in output
    assert "cannot be made another one: entropy: Operation not permitted\n" in output
    assert "templates.py" not in output.partition("short test summary")[0]
    commands = [line for line in output.splitlines() if " stop -f " in line]
    variable, _, *words = commands[0].split()
    vmctl = [sys.executable, "-m", "vmctl"]
    environ = {**os.environ, "VMD_SOCKET": variable.partition("=")[2]}
    shown = subprocess.run(
        [*vmctl, "status", "--json"], env=environ, cwd=ROOT, check=True, capture_output=True
    )
    running = [vm["name"] for vm in json.loads(shown.stdout) if vm["state"] == "running"]
    assert running == [words[-1]]
    subprocess.run([*vmctl, *words], env=environ, cwd=ROOT, check=True, capture_output=True)


def test_a_template_that_is_not_ready(runs: Runs) -> None:
    """The test's error has the command that started it, to repeat, and its console's output."""
    (runs.directory / "conftest.py").unlink()
    text = "pytestmark = [pytestmark, pytest.mark.vm(timeout=6)]\ndef test_it(vm): pass\n"
    status, output = runs.run(text)
    assert status == 1
    assert "not ready: the guest has no agent: nobody listens on its vsock port\n" in output
    assert f"it was started by: vmctl start --template --vsock auto -m 16M -p 1 -b {SELFTEST}" in (
        output
    )
    assert "its console ends with:\n" in output
    assert "vmm-kvm self-test guest" in output


SLEEPS = """
def test_it(vm):
    print("ready", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("victim", ["pytest", "keeper"])
def test_nothing_is_left_of_a_killed_run(runs: Runs, victim: str) -> None:
    """SIGKILL of pytest ends VMs, daemon and files; of the keeper, VMs and daemon."""
    with runs.start(SLEEPS, "-s") as process:
        assert process.stdout
        while "ready" not in process.stdout.readline():
            assert process.poll() is None
        if victim == "pytest":
            process.kill()
            process.wait(TIMEOUT_S)
        else:
            (keeper,) = runs.processes(b"vmm_pytest.keeper")
            assert len(runs.processes(b"vmd")) > 3
            os.kill(keeper, signal.SIGKILL)
            wait_until(lambda: not runs.processes(b"vmd"))
            process.kill()
            process.wait(TIMEOUT_S)
    wait_until(lambda: not runs.processes())
    if victim == "keeper":
        for folder in runs.folders():
            subprocess.run(["rm", "-r", runs.temporary / folder], check=True)


def test_workers_share_a_daemon(runs: Runs) -> None:
    """Two workers have one template; the machines of one that is killed end, the other's run on."""
    status, output = runs.run(
        """
import os, signal
from vmctl.client import Client

def state(vm_run):
    with Client(vm_run.daemon) as client:
        return [vm.name for vm in client.list()]

@pytest.mark.parametrize("number", range(6))
def test_it(vm, vm_run, number):
    assert sum("template" in name for name in state(vm_run)) == 1
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)

def test_last(vm_run):
    end = time.monotonic() + 60
    while len(state(vm_run)) > 3:
        assert time.monotonic() < end
        time.sleep(0.05)
""",
        *("-n", "2", "--vm-console=no"),
    )
    assert status == 1
    assert "1 failed, 6 passed" in output, output
    assert "crashed while running" in output
    assert "Console of" not in output


def test_another_daemon(runs: Runs, tmp_path: Path) -> None:
    """With --vm-socket VMs are of that daemon, which is left without any, and runs on."""
    with Daemon(tmp_path, "") as vmd:
        words = (f"--vm-socket={vmd.socket}", "--vm-console=all", "-rA")
        status, output = runs.run("def test_it(vm): vm.crash()\n", *words)
        assert status == 0, output
        assert output.count("- Console of pytest-") == 1
        runs.wait_until_clean()
        with vmd.client() as client:
            assert client.vms() == []
