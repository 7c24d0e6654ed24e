"""`vmctl connect`, `ssh` and `ssh-config`: a real sshd, by vsock and by the agent."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.agents import BOUND_S, Vsock, spliced, wait_until
from tests.unit.vmctl.conftest import Serve
from tests.unit.vmctl.fake_daemon import Answers
from tests.unit.vmctl.test_every_verb import vms
from tests.vmctl_driver import VMCTL
from vmd.wire.messages import AnyRequest, ErrorCode, Failed
from vmd.wire.ports import Connect, Connected

MIB = 1 << 20


def vmctl(
    *words: str | Path, stdin: bytes | None = None, home: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a command; with a `home`, ssh keeps the keys of guests there."""
    environment = dict(os.environ)
    if home:
        environment["XDG_STATE_HOME"] = str(home)
    return subprocess.run(
        [VMCTL, *words],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        check=False,
        timeout=BOUND_S,
        env=environment,
    )


# Ports


@contextmanager
def listening() -> Iterator[tuple[int, socket.socket]]:
    """Yield a TCP port of the loopback address, and what accepts there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(BOUND_S)
        yield listener.getsockname()[1], listener


def echo(listener: socket.socket, count: int = 1) -> threading.Thread:
    """Echo the data of some connections, one after the other."""

    def work() -> None:
        for _ in range(count):
            stream, _ = listener.accept()
            with stream:
                while data := stream.recv(65536):
                    stream.sendall(data)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_vsock_port(tmp_path: Path) -> None:
    """Data go both ways, and the end of input is passed on; the agent is not asked."""
    data = os.urandom(3 * MIB + 1)
    with Vsock(tmp_path / "vsock", {7: ["cat"]}) as guest:
        done = vmctl("connect", tmp_path / "vsock", "7", stdin=data)
        assert len(guest.pids) == 1
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == data


def test_a_tcp_port(tmp_path: Path) -> None:
    """Without a listener on vsock, the agent connects to the port of the loopback address."""
    data = os.urandom(3 * MIB + 1)
    with listening() as (port, listener), Vsock(tmp_path / "vsock"):
        thread = echo(listener)
        done = vmctl("connect", tmp_path / "vsock", str(port), stdin=data)
        thread.join(BOUND_S)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == data


def test_the_end_is_the_guests(tmp_path: Path) -> None:
    """Data after the end of input are passed on, and standard input need not end."""
    with listening() as (port, listener), Vsock(tmp_path / "vsock", {7: ["echo", "ready"]}):
        for number in (7, port):
            with subprocess.Popen(
                [VMCTL, "connect", tmp_path / "vsock", str(number)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            ) as process:
                if number == port:
                    stream, _ = listener.accept()
                    with stream:
                        stream.sendall(b"ready\n")
                assert process.stdout
                assert process.stdout.read() == b"ready\n"
                assert process.wait(BOUND_S) == 0


def test_a_killed_client_ends_the_guests_connection(tmp_path: Path) -> None:
    """The program that listens in the guest sees the end."""
    with listening() as (port, listener), Vsock(tmp_path / "vsock"):
        with subprocess.Popen(
            [VMCTL, "connect", tmp_path / "vsock", str(port)], stdin=subprocess.PIPE
        ) as process:
            stream, _ = listener.accept()
            process.send_signal(signal.SIGKILL)
            process.wait(BOUND_S)
        with stream:
            stream.settimeout(BOUND_S)
            assert stream.recv(1) == b""


def test_a_port_where_nobody_listens(tmp_path: Path) -> None:
    """One line, which has both reasons; status 255."""
    with listening() as (port, _listener):
        pass
    with Vsock(tmp_path / "vsock"):
        done = vmctl("connect", tmp_path / "vsock", str(port))
    assert done.returncode == 255
    assert done.stderr.decode() == (
        f"vmctl: by vsock and by TCP: port {port}: Connection refused\n"
    )


@pytest.mark.parametrize("port", ["x", "-1", "0", "4294967295", "99999999999", ""])
def test_what_is_no_port(port: str, tmp_path: Path) -> None:
    """It is refused."""
    done = vmctl("connect", "--", tmp_path / "vsock", port)
    assert (done.returncode, done.stderr.decode()) == (1, f"vmctl: invalid port: {port}\n")


def test_no_guest(tmp_path: Path) -> None:
    """Neither a socket nor a VM."""
    done = vmctl("connect", tmp_path / "vsock", "7")
    assert done.returncode == 255
    assert done.stderr.decode().endswith("/vsock: No such file or directory\n")


def test_by_the_daemon(serve: Serve) -> None:
    """The daemon is asked for that port, and then for the agent's."""
    threads: list[threading.Thread] = []

    def answer(request: AnyRequest) -> Answers:
        assert isinstance(request, Connect)
        theirs, ours = socket.socketpair()
        if request.port == 7:
            far, near = socket.socketpair()
            with near:
                near.sendall(b"hello")
            threads.append(spliced(ours, far))
        else:
            ours.close()
        return [(Connected(id=7), [theirs.detach()])]

    daemon = serve(answer)
    assert vmctl("connect", "web", "7").stdout == b"hello"
    done = vmctl("connect", "web", "8")
    for thread in threads:
        thread.join(BOUND_S)
    assert daemon.requests == [
        Connect(name="web", port=7),
        Connect(name="web", port=8),
        Connect(name="web", port=1024),
    ]
    assert done.returncode == 255
    assert done.stderr.decode() == (
        "vmctl: port 8: connection refused,"
        " and the guest has no agent: nobody listens on its vsock port\n"
    )


def test_what_the_daemon_refuses(serve: Serve) -> None:
    """A VM that is not there, or has no vsock device."""
    serve(lambda _request: [Failed(code=ErrorCode.EINVAL)])
    done = vmctl("connect", "web", "22")
    assert (done.returncode, done.stderr) == (255, b"vmctl: the vm has no vsock device\n")


# ssh


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host's and a user's key, with the configuration of an sshd that has them."""
    if shutil.which("sshd", path=SSHD_PATH) is None or shutil.which("ssh") is None:
        pytest.skip("sshd or ssh is not installed")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(words, check=True)
    if not os.geteuid():
        Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "config").write_text(
        f"HostKey {folder}/host\nPidFile none\nAuthorizedKeysFile {folder}/user.pub\n"
        "StrictModes no\nPermitRootLogin yes\nUsePAM no\nListenAddress 127.0.0.1\n"
        "LogLevel QUIET\n"
    )
    return folder


SSHD_PATH = "/usr/sbin:/usr/local/sbin"


def sshd(keys: Path, *options: str) -> list[str | Path]:
    """Return the command of an sshd."""
    program = shutil.which("sshd", path=SSHD_PATH)
    assert program
    return [program, "-f", keys / "config", *options]


def me() -> str:
    """Return this user's name."""
    return subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def guest(keys: Path, tmp_path: Path) -> Iterator[Path]:
    """The vsock socket of a guest with an sshd on vsock port 22."""
    with Vsock(tmp_path / "vsock", {22: sshd(keys, "-i")}):
        yield tmp_path / "vsock"


def ssh(
    keys: Path, guest: Path | str, *words: str, options: Sequence[str] = (), home: Path
) -> subprocess.CompletedProcess[bytes]:
    """Log in, without a question."""
    return vmctl(
        *("ssh", "-i", keys / "user", "-l", me(), "-o", "BatchMode=yes", *options, guest),
        *("--", *words),
        home=home,
    )


def test_ssh_by_vsock(keys: Path, guest: Path, tmp_path: Path) -> None:
    """The status is the command's; the guest's key is kept under the name of the VM."""
    done = ssh(keys, guest, "echo", "here;", "exit", "42", home=tmp_path)
    assert (done.returncode, done.stdout) == (42, b"here\n")
    assert ssh(keys, guest, "true", home=tmp_path).stderr == b""
    known = tmp_path / "vmm-kvm" / "known_hosts"
    name = str(guest).strip("/").replace("/", "_")
    words: list[str | Path] = ["ssh-keygen", "-F", name, "-f", known]
    found = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert found.split()[-2:] == (keys / "host.pub").read_text().split()[:2]


def test_another_key_is_refused(keys: Path, guest: Path, tmp_path: Path) -> None:
    """A guest that is not the one that was there before is not logged in to."""
    assert ssh(keys, guest, "true", home=tmp_path).returncode == 0
    known = tmp_path / "vmm-kvm" / "known_hosts"
    name, *_ = known.read_text().split()
    known.write_text(f"{name} {' '.join((keys / 'user.pub').read_text().split()[:2])}\n")
    done = ssh(keys, guest, "true", home=tmp_path)
    assert done.returncode == 255
    assert b"REMOTE HOST IDENTIFICATION HAS CHANGED" in done.stderr


def test_ssh_by_tcp(keys: Path, tmp_path: Path) -> None:
    """An sshd that listens for TCP alone is reached through the agent."""
    with listening() as (port, _listener):
        pass
    words = sshd(keys, "-D", "-p", str(port))
    with Vsock(tmp_path / "vsock"), subprocess.Popen(words, stderr=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: _answers(port))
            done = ssh(
                keys,
                tmp_path / "vsock",
                *("head", "-c", str(MIB), "/dev/zero"),
                options=["-p", str(port)],
                home=tmp_path,
            )
        finally:
            server.terminate()
    assert (done.returncode, done.stdout) == (0, bytes(MIB))


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_no_ssh_without_a_connection(tmp_path: Path, keys: Path) -> None:
    """The status is that of ssh, and a line says why."""
    done = ssh(keys, tmp_path / "none", "true", home=tmp_path)
    assert done.returncode == 255
    assert b"/none: No such file or directory" in done.stderr


def test_the_user_in_front_of_the_name(tmp_path: Path) -> None:
    """`user@name` is as for ssh; options of the command line come first."""
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    show.chmod(0o755)
    done = vmctl(
        "ssh", "--ssh", f"{show} -v", "-o", "A=b", "me@web", "--", "ls", "-l", home=tmp_path
    )
    words = done.stdout.decode().splitlines()
    assert words[:7] == ["-v", "-l", "me", "-p", "22", "-o", "A=b"]
    assert words[-4:] == ["--", "web", "ls", "-l"]
    assert f"ProxyCommand={VMCTL} connect -- web %p" in words
    assert "HostKeyAlias=web" in words
    assert f"UserKnownHostsFile={tmp_path}/vmm-kvm/known_hosts" in words


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["web\tx"], 1, "invalid name: web\\x09x"),
        (["-p", "x", "web"], 1, "invalid port: x"),
        (["--ssh", "/none", "web"], 127, "/none: not found"),
        (["--ssh", "'", "web"], 1, "No closing quotation"),
        (["a/\x1bb"], 1, "ssh takes no such path of a socket"),
        (["we%b"], 1, "invalid name: we%b"),
    ],
)
def test_what_makes_no_sense(words: list[str], status: int, told: str, tmp_path: Path) -> None:
    """It is one line."""
    done = vmctl("ssh", *words, home=tmp_path)
    assert (done.returncode, done.stderr.decode()) == (status, f"vmctl: {told}\n")


def test_ssh_config(keys: Path, tmp_path: Path) -> None:
    """The lines are those by which ssh itself, and scp, get there."""
    odd = tmp_path / "a 100% 'odd' path"
    odd.mkdir()
    with Vsock(odd / "vsock", {22: sshd(keys, "-i")}):
        shown = vmctl("ssh-config", odd / "vsock", home=odd)
        assert (shown.returncode, shown.stderr) == (0, b"")
        config = tmp_path / "config"
        config.write_bytes(shown.stdout)
        name = shown.stdout.decode().split()[1]
        words: list[str | Path] = ["ssh", "-F", config, "-i", keys / "user", "-l", me()]
        done = subprocess.run(
            [*words, "-o", "BatchMode=yes", name, "echo", "here"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=BOUND_S,
        )
    assert (done.returncode, done.stdout) == (0, b"here\n")


def test_ssh_config_of_all(serve: Serve, tmp_path: Path) -> None:
    """Without a name there is a block for each VM."""
    serve(lambda _request: [vms()])
    lines = vmctl("ssh-config", home=tmp_path).stdout.decode().splitlines()
    hosts = [line.split()[1] for line in lines if line.startswith("Host ")]
    assert hosts == [vm.name for vm in vms().vms]
    assert lines[:3] == [
        f"Host {hosts[0]}",
        "    User root",
        f"    ProxyCommand {VMCTL} connect -- {hosts[0]} %p",
    ]
