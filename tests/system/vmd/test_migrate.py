"""VMs that move from one daemon to another, both on this host; ssh is a script."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.campaigns import kill_migrate
from tests.system.vmd.daemon import READY, Client, Daemon, vm_block
from tests.vmctl_driver import VMCTL

pytestmark = pytest.mark.kvm

TIMEOUT_S = 120


@dataclass
class Hosts:
    """Two daemons, and the script that leads from the first to the second."""

    first: Daemon
    second: Daemon
    ssh: Path
    directory: Path

    def migrate(self, *words: str) -> subprocess.Popen[bytes]:
        """Start to migrate the VM `one`."""
        return subprocess.Popen(
            [VMCTL, "migrate", "--ssh", str(self.ssh), *words, "one", "second"],
            env={**os.environ, "VMD_SOCKET": str(self.first.socket)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def migrated(self, *words: str) -> tuple[int, str]:
        """Migrate it; return the exit status, and the output."""
        command = self.migrate(*words)
        said = command.communicate(timeout=TIMEOUT_S)[1].decode()
        return command.returncode, said

    def leads_by(self, script: str) -> None:
        """Let ssh run `script`, in which `"$@"` is the command for the other host."""
        self.ssh.write_text(
            f"#!/bin/sh\nshift\nVMD_SOCKET={self.second.socket}\n"
            f"PATH={VMCTL.parent}:$PATH\nexport VMD_SOCKET PATH\n{script}\n"
        )
        self.ssh.chmod(0o755)


@contextmanager
def hosts(directory: Path, *lines: str, seconds: tuple[str, ...] = ()) -> Iterator[Hosts]:
    """Run two daemons, the first with the VM `one`, which is running."""
    places = [directory / name for name in ("first", "second")]
    for place in places:
        place.mkdir()
    with (
        Daemon(places[0], vm_block("one", *lines, enabled=True)) as first,
        Daemon(places[1], "\n".join(seconds)) as second,
        first.client() as client,
    ):
        client.wait_for_state("one", "running")
        with client.console("one") as console:
            console.expect(READY)
        both = Hosts(first, second, directory / "ssh", directory)
        both.leads_by('exec sh -c "$*"')
        yield both


def answers(client: Client, name: str) -> None:
    """Fail unless a VM's guest answers input."""
    with client.console(name) as console:
        console.type(b"e")
        console.expect(b"e", console.output.count(b"e") + 1)


def disk_of(directory: Path, kind: str = "qcow2") -> str:
    """Make a disk; return its line of vm.conf."""
    path = directory / f"disk.{kind}"
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, "8M"], check=True)
    return f'disk "{path}" format {kind}'


def test_a_vm_goes_on_elsewhere(tmp_path: Path) -> None:
    """A migrated VM runs there with its disks and is gone here; it can come back."""
    disks = [disk_of(tmp_path, kind) for kind in ("raw", "qcow2")]
    with (
        hosts(tmp_path, *disks) as both,
        both.first.client() as here,
        both.second.client() as there,
        both.first.client() as watcher,
    ):
        watcher.ask("events")
        status, said = both.migrated()
        assert (status, said.splitlines()[-1]) == (0, "vmctl: migrated vm one to second")
        assert here.vm("one")["state"] == "stopped"
        assert there.vm("one")["state"] == "running"
        answers(there, "one")
        kinds = []
        while "stopped" not in kinds:
            event = watcher.receive()[0]
            kinds.append(event["kind"])
        assert kinds[-3:] == ["migrating", "sent", "stopped"]
        # The other daemon has its disks now.
        assert here.ask("start", name="one")["code"] == "disk-missing"


def test_a_receiver_that_cannot(tmp_path: Path) -> None:
    """If a VM of that name exists, the receiver says so, and the VM runs on here."""
    with hosts(tmp_path, disk_of(tmp_path), seconds=(vm_block("one"),)) as both:
        status, said = both.migrated()
        assert status == 1
        assert "vmctl: start vm command failed: Operation already in progress" in said
        assert "vmctl: migrate vm command failed: Input/output error" in said
        assert "vmctl: the receiver says: start vm command failed: Operation already in " in said
        with both.first.client() as here:
            here.wait_for_state("one", "running")
            answers(here, "one")
        assert both.migrated()[0] == 1  # once more
        both.leads_by("exit 127")
        status, said = both.migrated()
        assert (status, f"vmctl: {both.ssh} ended with status 127" in said) == (1, True)


def test_a_disk_that_is_not_shared(tmp_path: Path) -> None:
    """A disk of the same name without a lock is another one: refused, by its name."""
    line = disk_of(tmp_path, "raw")
    disk = tmp_path / "disk.raw"
    with hosts(tmp_path, line) as both:
        both.leads_by(
            f'exec unshare -m sh -c "mount --bind {tmp_path}/other {disk} && $*"'
            if os.geteuid() == 0
            else f'exec unshare -rm sh -c "mount --bind {tmp_path}/other {disk} && $*"'
        )
        (tmp_path / "other").write_bytes(bytes(8 << 20))
        status, said = both.migrated()
        if "unshare" in said or "mount" in said:
            pytest.skip(said)
        assert status == 1
        assert f"vmctl: disk {disk}: nobody writes to it: it is not the one that the VM has" in said
        with both.first.client() as here:
            here.wait_for_state("one", "running")


def test_it_is_interrupted(tmp_path: Path) -> None:
    """If the migration is interrupted, the VM runs on here; nothing is left there."""
    with hosts(tmp_path) as both, both.first.client() as here, both.second.client() as there:
        both.leads_by("sleep 3 <&0 & wait; exit 1")  # reads nothing
        command = both.migrate()
        deadline = time.monotonic() + TIMEOUT_S
        while here.ask("unpause", name="one").get("code") != "EBUSY":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        command.send_signal(signal.SIGINT)
        command.communicate(timeout=TIMEOUT_S)
        assert command.returncode == -signal.SIGINT
        here.wait_for_state("one", "running")
        answers(here, "one")
        assert there.ask("status")["vms"] == []


def test_it_takes_too_long(tmp_path: Path) -> None:
    """With a downtime of nothing the migration is cancelled in time, or forced, as requested."""
    with hosts(tmp_path) as both, both.first.client() as here, both.second.client() as there:
        both.leads_by('exec sh -c "$*"')
        status, said = both.migrated("--downtime", "0", "--timeout", "0.001")
        if status:  # the guest may not have written during a round
            assert "it has not come to 0 ms in 1 s" in said
            here.wait_for_state("one", "running")
            status, said = both.migrated(
                "--downtime", "0", "--timeout", "1", "--on-timeout", "force"
            )
        assert status == 0, said
        answers(there, "one")


def test_nobody_knows_whether_it_runs_there(tmp_path: Path) -> None:
    """If the connection ends between GO and RUNNING, the VM is paused in doubt until forced on."""
    line = disk_of(tmp_path)
    with hosts(tmp_path, line) as both, both.first.client() as here:
        # The receiver's output is lost after the first line, which says that it is ready.
        both.leads_by("exec 3<&0; cat <&3 > /dev/null & echo 'vmm-kvm: ready'; sleep 2")
        status, said = both.migrated()
        assert status == 1
        assert "nobody knows whether it runs there" in said
        here.wait_for_state("one", "paused")
        assert here.vm("one")["pause_reason"] == "in doubt"
        for request in ("unpause", "stop", "send"):
            fds = (os.open(os.devnull, os.O_WRONLY),) if request == "send" else ()
            extra = {"stream": 0} if fds else {}
            assert here.ask(request, fds, name="one", **extra)["code"] == "EBUSY"
            for fd in fds:
                os.close(fd)
        # Its disk is unlocked; once another VM has it, the VM cannot continue.
        disk = tmp_path / "disk.qcow2"
        other = subprocess.Popen(
            ["qemu-io", "-f", "qcow2", disk], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(b"write 0 512\n")
        other.stdin.flush()
        other.stdout.readline()
        refused = here.ask("unpause", name="one", force=True)
        assert refused["code"] == "EBUSY"
        assert "in use by another process" in str(refused["message"])
        other.communicate(b"quit\n", timeout=TIMEOUT_S)
        assert here.ask("unpause", name="one", force=True)["type"] == "done"
        answers(here, "one")


def test_a_receiver_that_fails_after_it_was_let_go(tmp_path: Path) -> None:
    """If the receiver reports that the VM never runs there, it gets its disks back and runs on."""
    with hosts(tmp_path, disk_of(tmp_path)) as both, both.first.client() as here:
        both.leads_by(
            "exec 3<&0; cat <&3 > /dev/null &\n"
            "echo 'vmm-kvm: ready'; sleep 1; echo 'vmm-kvm: failed: no room'"
        )
        status, said = both.migrated()
        assert status == 1
        assert "the receiver says: no room" in said
        here.wait_for_state("one", "running")
        answers(here, "one")


@contextmanager
def sshd(
    directory: Path, environment: str, prefix: Sequence[str] = (), address: str = "127.0.0.1"
) -> Iterator[str]:
    """Run an sshd of our own, by default on localhost; yield the ssh command for it.

    `prefix` are words before its command.
    """
    program = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if program is None or shutil.which("ssh") is None:
        pytest.skip("sshd or ssh is not installed")
    for name in ("host", "user"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(key, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = directory / "sshd_config"
    config.write_text(
        f"ListenAddress {address}:{port}\nHostKey {directory}/host\nPidFile none\n"
        f"AuthorizedKeysFile {directory}/user.pub\nStrictModes no\nPermitRootLogin yes\n"
        f"SetEnv {environment}\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    log = (directory / "sshd.log").open("wb")
    with log, subprocess.Popen([*prefix, program, "-D", "-e", "-f", config], stderr=log) as process:
        try:
            yield (
                f"ssh -p {port} -i {directory}/user -o BatchMode=yes -o StrictHostKeyChecking=no"
                " -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ConnectionAttempts=10"
            )
        finally:
            process.terminate()


def test_through_ssh(tmp_path: Path) -> None:
    """A migration works through a real sshd."""
    if os.geteuid() != 0:
        pytest.skip("an sshd of one's own needs root")
    with hosts(tmp_path, disk_of(tmp_path)) as both, both.second.client() as there:
        environment = f"VMD_SOCKET={both.second.socket} PATH={VMCTL.parent}:/usr/bin:/bin"
        with sshd(tmp_path, environment) as ssh:
            command = [str(VMCTL), "migrate", "--ssh", ssh, "one", "root@127.0.0.1"]
            done = subprocess.run(
                command,
                env={**os.environ, "VMD_SOCKET": str(both.first.socket)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        assert (done.returncode, done.stderr.decode().splitlines()[-1]) == (
            0,
            "vmctl: migrated vm one to root@127.0.0.1",
        ), done.stderr
        answers(there, "one")


def test_kills() -> None:
    """In a part of the campaign, after any kill two VMs never run, and none only with a message."""
    assert kill_migrate.main(["--count", "4", "--seed", "2"]) == 0


def test_kills_with_disks() -> None:
    """The same holds with disks that go along, and no half of one is left there."""
    assert kill_migrate.main(["--count", "4", "--seed", "3", "--copy-storage"]) == 0
