"""TPMs of the daemon's VMs: what a secret survives, who else gets it, and how swtpm is confined."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tpm_commands, tpm_guest
from tests.system.vmd.conftest import missing_separation
from tests.system.vmd.daemon import Client, Daemon, descendants, process_title, vm_block, vmctl
from tests.tpm_guest import READY, SECRET
from vmd.children import tpm_plan
from vmd.confine.uids import UIDS_DEFAULT
from vmd.shared.privsep import spawn
from vmd.wire.channel import Channel
from vmd.wire.tpm import PARENT_AND_TPM, StartTpm, TpmEnded
from vmm_kvm.swtpm import Swtpm

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed"),
]

Start = Callable[[str], Daemon]


def _shown(client: Client, name: str) -> bytes:
    """Return the responses that a VM's guest has shown since it was started."""
    with client.console(name) as console:
        console.expect(READY)
        return console.output


def _swtpms(vmd: Daemon) -> list[int]:
    return [pid for pid in descendants(vmd.process.pid) if process_title(pid) == "swtpm"]


def test_what_a_secret_survives(start_vmd: Start, tmp_path: Path) -> None:
    """A reboot, a stop, the daemon's end, the VM's deletion; no other VM has it."""
    image = tmp_path / "guest"
    image.write_bytes(tpm_guest.keeper())
    config = vm_block("one", "tpm", boot=image) + vm_block("two", "tpm", boot=image)
    with start_vmd(config) as vmd, vmd.client() as client:
        pid = client.ask("start", name="one")["pid"]
        assert client.vm("one")["state"] == "running"
        with client.console("one") as console:
            console.expect(READY)
            image.write_bytes(tpm_guest.reader())
            console.type(b"r")  # it reboots
            console.read_to_end()
        client.wait_for_reboot("one", pid)
        with client.console("one") as console:
            console.expect(READY, 2)
            assert SECRET in console.output
        assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
        assert client.ask("start", name="one")["type"] == "started"
        assert SECRET in _shown(client, "one")
        assert client.ask("start", name="two")["type"] == "started"
        assert SECRET not in _shown(client, "two")
        made = vmctl(vmd, "start", "--tpm", "-b", str(image), "-m", "64M", "three")
        assert made.returncode == 0, made.stderr
        assert SECRET not in _shown(client, "three")
        assert "\ntpm: " in vmctl(vmd, "show", "one").stdout
    with start_vmd(config) as vmd, vmd.client() as client:
        assert client.ask("start", name="one")["type"] == "started"
        assert SECRET in _shown(client, "one")
        for words in (("clone", "one", "c"), ("snapshot", "one", "s"), ("send", "one")):
            done = vmctl(vmd, *words)
            assert (done.returncode, done.stdout) == (1, "")
            assert 'vm "one" has a TPM, whose secrets stay with it' in done.stderr, words


def test_a_swtpm_that_is_killed(start_vmd: Start, tmp_path: Path) -> None:
    """One line says so; the VM runs on, and has its TPM again when it is started anew."""
    image = tmp_path / "guest"
    image.write_bytes(tpm_guest.keeper())
    with start_vmd(vm_block("one", "tpm", boot=image)) as vmd, vmd.client() as client:
        client.ask("start", name="one")
        _shown(client, "one")
        (pid,) = _swtpms(vmd)
        os.kill(pid, signal.SIGKILL)
        vmd.wait_for_log("vm/one: its TPM is gone: swtpm was killed by signal 9")
        assert client.vm("one")["state"] == "running"
        image.write_bytes(tpm_guest.reader())
        client.ask("stop", name="one", force=True, wait=True)
        client.ask("start", name="one")
        assert SECRET in _shown(client, "one")
        assert vmd.log.read_text().count("its TPM is gone") == 1


def test_without_the_process_that_starts_it(start_vmd: Start, tmp_path: Path) -> None:
    """A VM with a TPM that runs keeps it; none is started any more, and all others are."""
    image = tmp_path / "guest"
    image.write_bytes(tpm_guest.keeper())
    config = vm_block("one", "tpm", boot=image) + vm_block("two", "tpm") + vm_block("plain")
    with start_vmd(config) as vmd, vmd.client() as client:
        client.ask("start", name="one")
        _shown(client, "one")
        os.kill(vmd.child("vmd: tpm"), signal.SIGKILL)
        vmd.wait_for_log("no VM with a TPM can be started before vmd is started anew")
        failed = client.ask("start", name="two")
        assert failed["message"] == "tpm: the process that starts swtpm has ended: restart vmd"
        assert client.ask("start", name="plain")["type"] == "started"
        assert client.vm("one")["state"] == "running"


def test_a_vm_that_ends_during_a_command(tmp_path: Path) -> None:
    """A swtpm that does not end with its VM is killed, and the next one has its state."""
    child = spawn(tpm_plan(None))
    with Channel(child.connection, PARENT_AND_TPM) as channel:

        def start(number: int) -> Swtpm:
            (control, other), (data, another) = socket.socketpair(), socket.socketpair()
            directory = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
            order = StartTpm(number=number, vm="one", state="one-0", uid=0)
            channel.send(order, [directory, other.detach(), another.detach()])
            return Swtpm(control, data)

        with start(1) as first:
            first.power_on()
            first.execute(tpm_commands.STARTUP)
            first._data.sendall(tpm_commands.SELF_TEST)
        with start(2) as second:
            assert channel.wait()[0] == TpmEnded(number=1)
            second.power_on()
            assert tpm_commands.code(second.execute(tpm_commands.STARTUP)) == 0
        assert channel.wait()[0] == TpmEnded(number=2)
    assert os.waitpid(child.pid, 0)[1] == 0


@pytest.mark.skipif(bool(missing_separation()), reason=str(missing_separation()))
def test_the_rights_of_swtpm(tmp_path: Path) -> None:
    """It is a user of its own, without capabilities, network and files but its own."""
    image = tmp_path / "guest"
    image.write_bytes(tpm_guest.keeper())
    names = ("one", "two")
    config = "".join(vm_block(name, "tpm", boot=image) for name in names)
    with Daemon(tmp_path, config, is_user=False) as vmd, vmd.client() as client:
        found: dict[str, str] = {}
        for name in names:
            before = set(_swtpms(vmd))
            client.ask("start", name=name)
            _shown(client, name)
            (pid,) = set(_swtpms(vmd)) - before
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            status = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
            (uid,) = set(status["Uid"]) | set(status["Gid"])
            assert status["Groups"] == []
            assert UIDS_DEFAULT.first <= int(uid) < UIDS_DEFAULT.first + UIDS_DEFAULT.size
            for kind in ("Eff", "Prm", "Inh", "Bnd", "Amb"):
                assert int(status[f"Cap{kind}"][0], 16) == 0, kind
            assert status["NoNewPrivs"] == ["1"]
            assert int(status["Seccomp_filters"][0]) >= 2
            state = tmp_path / "state" / "tpm" / f"{name}-0"
            assert Path(f"/proc/{pid}/cwd").readlink() == state
            files = [state, *state.iterdir()]
            assert {path.stat().st_uid for path in files[1:]} == {int(uid)}
            assert (state.parent.stat().st_uid, state.parent.stat().st_mode & 0o777) == (0, 0o700)
            links = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
            kinds = {link.partition(":")[0].removeprefix(str(state)) for link in links}
            assert kinds <= {"socket", "pipe", "anon_inode", "/dev/null", "/memfd", "/.lock"}
            found[name] = uid
        assert found["one"] != found["two"]
        pids = {process_title(pid): pid for pid in descendants(vmd.process.pid)}
        assert Path(f"/proc/{pids['vm/one']}").stat().st_uid != int(found["one"])
