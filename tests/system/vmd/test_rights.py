"""Rights of users other than root, at root's daemon."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import (
    ROOT,
    SELFTEST,
    TIMEOUT_S,
    Daemon,
    process_title,
    vm_block,
    vmctl,
)
from tests.system.vmd.users import USER, being, connection
from vmd.confine.confinements import PARENT_CAPABILITIES

CAP_SYS_PTRACE = 19

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.root,
    needs_separation,
]


def test_a_user_without_rights(reachable: Path) -> None:
    """A user of the socket sees all VMs, and can do nothing with those of others."""
    config = f"socket owner {USER}\n" + vm_block("one", enabled=True)
    with (
        Daemon(reachable, config, is_user=False) as vmd,
        vmd.client() as root,
        connection(vmd, USER) as client,
    ):
        pid = root.wait_for_state("one", "running")["pid"]
        assert client.vm("one")["pid"] == pid
        for kind in ("stop", "pause", "unpause", "wait", "console", "start", "history"):
            assert client.ask(kind, name="one")["code"] == "EPERM", kind
        for kind in ("reload", "reset", "hold"):
            assert client.ask(kind)["code"] == "EPERM", kind
        assert client.ask("load", path="/etc/vm.conf")["code"] == "EPERM"
        assert client.ask("log", level=2)["code"] == "EPERM"
        with SELFTEST.open("rb") as kernel:
            made = client.ask("start", (kernel.fileno(),), name="mine", kernel=0)
        assert made["code"] == "EPERM"
        assert root.vm("one")["pid"] == pid


def test_an_owner(reachable: Path) -> None:
    """An owner starts, pauses and stops a VM, and has its terminal."""
    config = f"socket owner {USER}\n" + vm_block("one", f"owner {USER}")
    with Daemon(reachable, config, is_user=False) as vmd, connection(vmd, USER) as client:
        started = client.ask("start", name="one")
        assert started["type"] == "started", started
        assert Path(str(started["tty"])).stat().st_uid == USER
        assert client.ask("pause", name="one")["type"] == "done"
        assert client.ask("unpause", name="one")["type"] == "done"
        assert client.ask("stop", name="one", wait=True)["type"] == "terminated"


def test_files_of_an_instance_are_opened_with_its_makers_rights(reachable: Path) -> None:
    """A user's instance gets no disk that the user could not open."""
    secret, own = reachable / "secret", reachable / "own"
    for path in (secret, own):
        path.write_bytes(bytes(1 << 20))
    secret.chmod(0o600)
    own.chmod(0o600)
    os.chown(own, USER, USER)
    config = f"socket owner {USER}\n" + vm_block(
        "template", "allow instance { disk, memory }", f"allow instance {{ owner {USER} }}"
    )
    with Daemon(reachable, config, is_user=False) as vmd, connection(vmd, USER) as client:
        refused = client.ask(
            "start", name="mine", instance="template", disks=[{"path": str(secret)}]
        )
        assert (refused["type"], refused["code"]) == ("failed", "EPERM"), refused
        started = client.ask("start", name="mine", instance="template", disks=[{"path": str(own)}])
        assert started["type"] == "started", started


def test_nobody_else_gets_to_the_socket(reachable: Path) -> None:
    """Without an owner, the socket belongs to root alone."""
    with Daemon(reachable, "", is_user=False) as vmd:
        status = vmd.socket.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (0, 0, 0o660)
        with pytest.raises(PermissionError), connection(vmd, USER):
            pass


def test_one_user_cannot_shut_others_out(reachable: Path) -> None:
    """Connections of one user are limited; root still connects, and is served."""
    with Daemon(reachable, f"socket owner {USER}\n", is_user=False) as vmd:
        with being(USER):
            crowd = [vmd.client() for _ in range(300)]
        try:
            with vmd.client() as root:
                assert root.ask("status")["vms"] == []
        finally:
            for client in crowd:
                client.__exit__()


def test_a_control_process_that_lies(reachable: Path) -> None:
    """A compromised control process cannot act as root: each try ends it, and nothing is reset."""
    config = f"socket owner {USER}\n" + vm_block("one", enabled=True)
    program = ("-m", "tests.system.vmd.hostile_control")
    with Daemon(reachable, config, is_user=False, program=program) as vmd:
        pid = vmd.wait_for_child("vm/one")
        for lie, complaint in (
            (b"listener", "control: client 1 is no connection of ours"),
            (b"parent", "control: client 1 is no connection of ours"),
            (b"nobody", "control: client 1 has not come"),
            (b"uid", "not a message"),
        ):
            with being(USER), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                client.connect(str(vmd.socket))
                client.send(lie)
                vmd.wait_for_log(complaint)
                assert client.recv(1) == b""
            vmd.log.write_text("")
        with being(USER), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(vmd.socket))
            client.send(b"itself")
            assert json.loads(client.recv(1000))["code"] == "EPERM"
        assert process_title(pid) == "vm/one"


def test_the_parent_keeps_what_it_needs(reachable: Path) -> None:
    """The parent keeps the table's capabilities of root's, and no program could gain more."""
    with Daemon(reachable, "", is_user=False) as vmd:
        status = Path(f"/proc/{vmd.process.pid}/status").read_text()
        found = dict(line.split(":\t") for line in status.splitlines())
        allowed = sum(1 << number for number in PARENT_CAPABILITIES)
        for name in ("CapPrm", "CapEff", "CapBnd"):
            assert int(found[name], 16) & ~allowed == 0, name
        assert int(found["CapEff"], 16) & 1 << CAP_SYS_PTRACE == 0
        assert found["NoNewPrivs"] == "1"


def test_the_unit_leaves_the_parent_as_much() -> None:
    """The service's bounding set equals the parent's own."""
    unit = (ROOT / "packaging" / "vmd.service").read_text()
    (line,) = [each for each in unit.splitlines() if each.startswith("CapabilityBoundingSet=")]
    names = {reason.partition(":")[0] for reason in PARENT_CAPABILITIES.values()}
    assert set(line.partition("=")[2].split()) == names


def test_snapshots_are_their_users_alone(reachable: Path) -> None:
    """An owner makes snapshots if allowed, with the owner's files; other users cannot see them."""
    config = (
        f"socket owner {USER}\nlimit snapshots 1\n"
        + vm_block("one", f"owner {USER}", "allow snapshot", enabled=True)
        + vm_block("two", f"owner {USER}", enabled=True)
    )
    with (
        Daemon(reachable, config, is_user=False) as vmd,
        connection(vmd, USER) as client,
        vmd.client() as root,
    ):
        for name in ("one", "two"):
            root.wait_for_state(name, "running")
        assert client.ask("snapshot", name="two", snapshot="a")["message"] == (
            'vm "two" no permission to make snapshots'
        )
        assert client.ask("snapshot", name="one", snapshot="a")["type"] == "done"
        assert client.ask("snapshot", name="one", snapshot="b")["message"] == (
            "limit of 1 snapshots of one user"
        )
        assert root.vm("one")["state"] == "running"
        assert root.ask("snapshot", name="two", snapshot="a")["type"] == "done"
        (path,) = (reachable / "state" / "snapshots" / str(USER)).iterdir()
        assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (USER, 0o600)
        with being(USER), pytest.raises(PermissionError):
            path.open("rb")  # not by name: the directory is the daemon's
        for who in (client, root):
            found = who.ask("snapshots")["snapshots"]
            assert isinstance(found, list)
            assert [one["name"] for one in found] == ["a"]
        client.send("open-snapshot", snapshot="a")
        answer, fds = client.receive()
        assert (answer["type"], len(fds)) == ("snapshot-opened", 1)
        with os.fdopen(fds[0], "rb") as file:
            assert os.fstat(file.fileno()).st_ino == path.stat().st_ino
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(file.fileno(), b"x", 0)
        assert client.ask("remove-snapshot", snapshot="a")["type"] == "done"
        assert client.ask("remove-snapshot", snapshot="a")["code"] == "ENOENT"
        assert root.ask("remove-snapshot", snapshot="a")["type"] == "done"


def as_user(vmd: Daemon, *words: str) -> tuple[int, str]:
    """Run vmctl as a user; returns its status, and its last line."""
    done = subprocess.run(
        [sys.executable, "-m", "vmctl", *words],
        env={**os.environ, "VMD_SOCKET": str(vmd.socket), "HOME": "/nonexistent"},
        cwd=ROOT,
        user=USER,
        group=USER,
        extra_groups=[],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.returncode, (done.stdout.splitlines() or [""])[-1]


def test_an_owner_starts_from_snapshots(reachable: Path) -> None:
    """The owner's VM goes back, and has copies within limits; one of another VM is refused."""
    disk, tools = reachable / "disk.raw", reachable / "tools"
    for path in (disk, tools):
        path.write_bytes(bytes(1 << 20))
        path.chmod(0o600)  # root's
    lines = (f'disk "{disk}" format raw', f'disk "{tools}" {{ ro }}', "allow snapshot")
    config = (
        f"socket owner {USER}\nlimit vms 1\n"
        + vm_block("one", f"owner {USER}", *lines, enabled=True)
        + vm_block("two", "allow snapshot", enabled=True)
    )
    with Daemon(reachable, config, is_user=False) as vmd, vmd.client() as root:
        for name in ("one", "two"):
            root.wait_for_state(name, "running")
        assert as_user(vmd, "snapshot", "one", "first")[0] == 0
        status, _ = as_user(vmd, "start", "copy", "--from", "first")
        assert status == 0
        shown = root.vm("copy")
        assert (shown["state"], shown["uid"]) == ("running", USER)
        assert as_user(vmd, "start", "more", "--from", "first") == (
            1,
            "vmctl: limit of 1 VMs of one user",
        )
        for name in ("copy", "one"):
            assert as_user(vmd, "stop", "-fw", name)[0] == 0
        assert as_user(vmd, "start", "one", "--from", "first")[0] == 0
        assert root.vm("one")["state"] == "running"
        path = reachable / "others"
        assert vmctl(vmd, "snapshot", "-o", str(path), "two").returncode == 0
        path.chmod(0o644)
        for name, text in (("two", "the VM is not yours"), ("new", 'vm "two" is not yours')):
            assert as_user(vmd, "start", name, "--from", str(path)) == (1, f"vmctl: {text}")
