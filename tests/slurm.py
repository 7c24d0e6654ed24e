"""A Slurm of two network namespaces: munged, slurmctld, and a slurmd for each."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.agents import wait_until
from tests.system.vmd.netns import Namespace

PROGRAMS = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
"""The programs, and their packages in Debian."""
NODES = {"one": "10.0.0.1", "two": "10.0.0.2"}
_PATH = f"{os.environ['PATH']}:/usr/sbin"
_END_S = 60


def missing_slurm() -> str | None:
    """Return why there can be no Slurm here."""
    missing = [package for name, package in PROGRAMS.items() if not shutil.which(name, path=_PATH)]
    return f"not installed: {' '.join(missing)}" if missing else None


class Slurm:
    """A cluster whose daemons run; its commands are called in the first namespace."""

    def __init__(self, directory: Path, slots: int, memory_mib: int, stack: ExitStack) -> None:
        """Start it; `stack` ends it. Each node declares so many VMs, and memory for all of them."""
        self._directory = directory
        self._stack = stack
        self._spaces = {name: stack.enter_context(Namespace()) for name in NODES}
        addresses = [f"{address}/24" for address in NODES.values()]
        self._spaces["one"].connect(self._spaces["two"], *addresses)
        self.environ = {
            **{name: value for name, value in os.environ.items() if "SLURM" not in name},
            "PATH": _PATH,
            "SLURM_CONF": str(directory / "slurm.conf"),
        }
        for name in ("state", "spool", "munge"):
            (directory / name).mkdir()
        (directory / "slurm.conf").write_text(_configuration(directory, slots, memory_mib))
        (directory / "gres.conf").write_text(f"Name=kvm Count={slots}\n")
        self._start_munged(directory / "munge")
        self._start("one", "slurmctld", "-D")
        self._nodes = {name: self._start(name, "slurmd", "-D", "-N", name) for name in NODES}
        wait_until(
            lambda: self.run("sinfo", "-hN", "-o", "%T", check=False).split() == ["idle"] * 2
        )

    def run(self, *command: str, check: bool = True, seconds: float = _END_S) -> str:
        """Run a command of Slurm; returns its output."""
        done = subprocess.run(
            [*self._spaces["one"].prefix, *command],
            cwd=self._directory,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert not check or not done.returncode, f"{command}: {done.stderr}{self.logs()}"
        return done.stdout

    def _is_ready(self) -> bool:
        return self.run("sinfo", "-hN", "-o", "%T", check=False).split() == ["idle"] * len(NODES)

    def restart_node(self, name: str) -> None:
        """End a slurmd by SIGKILL, and start another one."""
        self._nodes[name].kill()
        self._nodes[name].wait()
        self._nodes[name] = self._start(name, "slurmd", "-D", "-N", name)

    def logs(self) -> str:
        """Return the ends of the daemons' output."""
        logs = sorted(self._directory.glob("*.log"))
        return "".join(f"\n== {log.name}\n{log.read_text()[-1000:]}" for log in logs)

    def _start_munged(self, directory: Path) -> None:
        key = directory / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {"key": "key", "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
        options = [
            f"--{name}{'' if name == 'socket' else '-file'}={directory / file}"
            for name, file in files.items()
        ]
        # --force: the directories above are the test's.
        self._start("one", "munged", "--foreground", "--force", *options)
        wait_until((directory / "socket").exists)

    def _start(self, node: str, *words: str) -> subprocess.Popen[bytes]:
        with (self._directory / f"{words[0]}-{node}.log").open("ab") as log:
            process = subprocess.Popen(
                [*self._spaces[node].prefix, *words],
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._stack.callback(_end, process)
        return process


@contextmanager
def slurm(directory: Path, slots: int, memory_mib: int) -> Iterator[Slurm]:
    """Yield a cluster."""
    with ExitStack() as stack:
        yield Slurm(directory, slots, memory_mib, stack)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


def _configuration(directory: Path, slots: int, memory_mib: int) -> str:
    nodes = "".join(
        f"NodeName={name} NodeAddr={address} CPUs={slots} RealMemory={memory_mib}"
        f" Gres=kvm:{slots}\n"
        for name, address in NODES.items()
    )
    return f"""ClusterName=fleet
SlurmctldHost={socket.gethostname().partition(".")[0]}({NODES["one"]})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=kvm
MpiDefault=none
ReturnToService=2
KillWait=2
MailProg=/bin/true
{nodes}PartitionName=vms Nodes=ALL Default=YES MaxTime=30 State=UP
"""
