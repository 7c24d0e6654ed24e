"""Jobs over hosts: by Dask, each in a machine of a vmd."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.agents import CLONES_AGENT, HostAgent, wait_until
from tests.campaigns import fleet, fleet_slurm
from tests.fleet import two_hosts
from tests.slurm import missing_slurm
from tests.system.vmd.daemon import ROOT, SELFTEST, TIMEOUT_S, Daemon, vmctl
from tests.system.vmd.netns import Namespace
from tests.system.vmd.pytest_runs import Runs, runs
from tests.system.vmd.test_migrate import sshd
from vmm_fleet.host import Host, LostError
from vmm_fleet.jobs import InVm
from vmm_pytest.machine import CommandFailedError, Machine, MachineError

__all__ = ("runs",)

pytestmark = pytest.mark.kvm

SETTINGS = {"kernel": str(SELFTEST), "memory": "16M"}


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostAgent]:
    """Yield an agent for all guests; temporary files are in the test's directory."""
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setenv("REFUSES", str(tmp_path / "refuses"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with HostAgent(tmp_path / "agent", program=CLONES_AGENT) as host:
        yield host


def _names(vmd: Daemon) -> list[str]:
    with vmd.client() as client:
        return [str(vm["name"]) for vm in client.vms()]


def _keeper(directory: Path) -> int:
    """Return the keeper's pid."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if b"vmm_pytest.keeper" in words and any(str(directory).encode() in one for one in words):
            return int(path.parent.name)
    raise AssertionError("no keeper")


def test_a_machine_for_each_job(tmp_path: Path, agent: HostAgent) -> None:
    """A job's failure is its own; the loss of the daemon or of the keeper is another one."""
    with Daemon(tmp_path, "") as vmd, Host(str(vmd.socket), lambda _: agent.agent) as host:
        names: list[str] = []

        def count(vm: Machine) -> str:
            names.append(vm.name)
            vm.send_console("n")
            return vm.wait_for_console_text(r"seconds\s+\d+")

        for _ in range(2):
            assert host.run(count, SETTINGS).split() == ["seconds", "1"]
        assert len(set(names)) == 2
        with pytest.raises(CommandFailedError, match="exit status 7") as failed:
            host.run(lambda vm: vm.succeed("echo out; exit 7"), SETTINGS)
        again = pickle.loads(pickle.dumps(failed.value))
        assert (again.status, again.output, str(again)) == (7, "out\n", str(failed.value))

        def crash(vm: Machine) -> None:
            vm.crash()
            vm.wait_for_console_text("never")

        with pytest.raises(MachineError, match="the console has ended"):
            host.run(crash, SETTINGS)
        with pytest.raises(MachineError, match="/none: No such file"):
            host.run(count, {"kernel": "/none"})
        (template,) = _names(vmd)

        def lose_keeper(vm: Machine) -> None:
            os.kill(_keeper(tmp_path), signal.SIGKILL)
            names.append(vm.name)
            vm.wait_for_console_text("never", timeout=0.1)

        with pytest.raises(LostError):
            host.run(lose_keeper, SETTINGS)
        assert template in host.run(lambda _: _names(vmd), SETTINGS)
        assert names[-1] not in _names(vmd)

        def lose_daemon(vm: Machine) -> None:
            vmd.process.kill()
            vmd.process.wait()
            vm.wait_for_console_text("never")

        with pytest.raises(LostError):
            host.run(lose_daemon, SETTINGS)
        with Daemon(tmp_path, "") as other:
            assert host.run(count, SETTINGS).split() == ["seconds", "1"]
            assert len(_names(other)) == 1
    wait_until(lambda: not list(tmp_path.glob("vmm-fleet-*")))


def test_resources() -> None:
    """What a job needs of a worker is what its machine has."""
    job = InVm(lambda vm, word: vm.succeed(word), kernel="k", memory="1G", cpus=2)
    assert job.resources == {"vm_memory": 1024, "vm_cpus": 2}
    with pytest.raises(TypeError):
        InVm(print, colour=1)
    with pytest.raises(ValueError, match="invalid memory size: x"):
        InVm(print, memory="x")


def test_a_worker_that_declares_nothing() -> None:
    """It ends, and says what is missing."""
    words = ("-m", "distributed.cli.dask_worker", "tcp://127.0.0.1:1", "--no-nanny")
    done = subprocess.run(
        [sys.executable, *words, "--no-dashboard", "--preload", "vmm_fleet.worker"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode
    assert "vmm_fleet: no resource vm_cpus, vm_memory: dask worker --resources" in done.stderr


@pytest.mark.root
@pytest.mark.timeout(300)
def test_killed_workers_and_daemons(tmp_path: Path) -> None:
    """Every job has one result, no host more machines than declared, and none is left."""
    figures = fleet.run(tmp_path, 8, 1)
    assert sum(figures.results.values()) == 8


@pytest.mark.root
@pytest.mark.timeout(300)
def test_a_snapshot_by_its_digest(tmp_path: Path) -> None:
    """A host that lacks it gets it from the other one, and machines of both go on from it."""
    with two_hosts(tmp_path) as (one, two, address):
        file = one.directory / "made"
        words = ("start", "--selftest", "-m", "16M", "source")
        for line in (words, ("snapshot", "-o", str(file), "source"), ("stop", "-fw", "source")):
            assert vmctl(one.vmd, *line).returncode == 0
        with one.process("-m", "vmm_fleet.snapshots", str(file)) as adding:
            assert adding.wait(TIMEOUT_S) == 0
        digest = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
        stored = f"data/vmm-kvm/snapshots/{digest.replace(':', '-')}"
        assert not (two.directory / stored).exists()
        done = subprocess.run(
            [
                *one.space.prefix,
                *(sys.executable, str(ROOT / "tests" / "fleet_snapshot_jobs.py"), address, digest),
            ],
            env={**os.environ, **one.environ},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        first, second, small, lost = done.stdout.splitlines()
        assert [line.split()[0] for line in (first, second)] == ["two", "one"]
        assert first.split()[1] != second.split()[1]
        assert small == "the snapshot is of a machine with memory=16M, cpus=1: declare them"
        assert lost == f"sha256-{'0' * 64}: no worker's host has it"
        assert (two.directory / stored).read_bytes() == file.read_bytes()


@pytest.mark.skipif(bool(missing_slurm()), reason=f"Slurm: {missing_slurm()}")
@pytest.mark.root
@pytest.mark.timeout(300)
def test_slurm(tmp_path: Path) -> None:
    """Every job of sbatch has one result, though a slurmd is killed, and leaves no VM."""
    figures = fleet_slurm.run(tmp_path, 8, 1, requeues=False)
    assert sum(figures.results.values()) == 8


SUITE = r"""
import os

@pytest.mark.parametrize("number", range(4))
def test_it(vm, number):
    vm.send_console("n")
    assert vm.wait_for_console_text(r"seconds\s+\d+").split() == ["seconds", "1"]
    with open(os.environ["DONE"], "a") as file:
        file.write(f"{number} {os.environ['FLEET_HOST']} {vm.name}\n")
"""


@pytest.mark.root
@pytest.mark.timeout(300)
def test_a_suite_over_hosts(runs: Runs) -> None:
    """Workers of pytest-xdist on two hosts have a daemon on each, and leave nothing."""
    done = runs.directory / "done"
    (runs.directory / "pytest.ini").write_text("[pytest]\nrsyncignore = tmp\n")
    with ExitStack() as stack:
        one, two = (stack.enter_context(Namespace()) for _ in range(2))
        one.connect(two, "10.0.0.1/24", "10.0.0.2/24")
        options = ["-d", "--rsyncdir", str(runs.directory)]
        for name, address, space in (("a", "10.0.0.1", one), ("b", "10.0.0.2", two)):
            place = runs.temporary / name
            place.mkdir()
            environ = {**runs.of_agent, "FLEET_HOST": name, "DONE": str(done), "TMPDIR": str(place)}
            words = " ".join(f"{key}={value}" for key, value in environ.items())
            ssh = stack.enter_context(sshd(place, words, space.prefix, address))
            where = f"root@{address} {ssh.removeprefix('ssh ')}"
            options += ["--tx", f"ssh={where}//python={sys.executable}//chdir={place}"]
        status, output = runs.run(SUITE, *options, through=one.prefix)
        assert status == 0, output
    told = [line.split() for line in done.read_text().splitlines()]
    assert sorted(int(number) for number, _, _ in told) == list(range(4)), output
    assert {host for _, host, _ in told} == {"a", "b"}
