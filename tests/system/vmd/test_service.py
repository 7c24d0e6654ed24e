"""The daemon under a service manager: an inherited socket, and a watchdog."""

from __future__ import annotations

import logging
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.system.vmd.daemon import ROOT, TIMEOUT_S, Client, Daemon, vm_block
from vmd.shared import log

pytestmark = pytest.mark.kvm

WATCHDOG_S = 0.4
# As in a service manager, between fork and exec: the socket becomes descriptor 3.
_HAND_OVER = """
import os, sys
words = sys.argv[1:]
at = words.index("--")
if at:
    os.dup2(int(words[0]), 3, inheritable=True)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(words[at + 1], words[at + 1:])
"""


@contextmanager
def _service(
    folder: Path, listener: socket.socket | None = None, **environment: str
) -> Iterator[socket.socket]:
    """Run vmd as a service manager does; gives the socket that it notifies."""
    config = folder / "vm.conf"
    config.write_text(vm_block("one"))
    keep = (listener.fileno(),) if listener else ()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
        notifications.bind(str(folder / "notify"))
        notifications.settimeout(TIMEOUT_S)
        with subprocess.Popen(
            [
                *(sys.executable, "-c", _HAND_OVER, *map(str, keep), "--"),
                *(sys.executable, "-m", "vmd", "-d", "--user"),
                *("-f", str(config), *([] if listener else ["--socket", str(folder / "socket")])),
            ],
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify"), **environment},
            pass_fds=keep,
        ) as process:
            try:
                while "READY=1" not in notifications.recv(4096).decode():
                    pass
                yield notifications
            finally:
                process.send_signal(signal.SIGTERM)
                assert process.wait(TIMEOUT_S) == 0


def test_a_socket_of_the_service_manager(tmp_path: Path) -> None:
    """Clients are served on the inherited socket, earlier ones too; it is not removed."""
    path = tmp_path / "activated"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        with Client(path) as early, _service(tmp_path, listener):
            assert early.vm("one")["state"] == "stopped"
            with Client(path) as client:
                assert client.vm("one")["state"] == "stopped"
    assert path.is_socket()


def test_the_watchdog_is_fed(tmp_path: Path) -> None:
    """A live daemon notifies the watchdog twice in each interval; a hanging one does not."""
    with _service(tmp_path, WATCHDOG_USEC=str(int(WATCHDOG_S * 1e6))) as notifications:
        begun = time.monotonic()
        for _ in range(6):
            while "WATCHDOG=1" not in notifications.recv(4096).decode():
                pass
        assert time.monotonic() - begun < 6 * WATCHDOG_S


def test_messages_go_to_syslog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background a message is a packet for /dev/log, with priority, program and title."""
    path = tmp_path / "log"
    monkeypatch.setattr(log, "_DEV_LOG", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(path))
        syslog.settimeout(TIMEOUT_S)
        pid = os.fork()
        if pid == 0:
            log.open_log(is_foreground=False)
            log.set_verbosity(1)
            log.set_title("vm/alpine")
            logging.getLogger("vmd.test").warning("two\nlines")
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert syslog.recv(4096).decode() == f"<28>vmd[{pid}]: vm/alpine: two\\x0alines"


def test_a_log_that_nobody_reads(tmp_path: Path) -> None:
    """An unread log stops no process: clients are answered, VMs run and end, the daemon ends."""
    config = tmp_path / "vm.conf"
    config.write_text(vm_block("one"))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "vmd", "-d", "-vv", "--user"),
            *("-f", str(config), "--socket", str(tmp_path / "socket")),
        ],
        cwd=ROOT,
        stderr=writer,
    ) as process:
        os.close(writer)
        deadline = time.monotonic() + TIMEOUT_S
        while not (tmp_path / "socket").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with Client(tmp_path / "socket") as client:
            assert client.ask("start", name="one")["type"] == "started"
            for _ in range(500):
                client.ask("stop", name="none")
            assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    os.close(reader)


def test_requests_are_told_with_who_asked(tmp_path: Path) -> None:
    """Each action and each refusal is a log line with the user's name."""
    user = pwd.getpwuid(os.getuid()).pw_name
    with Daemon(tmp_path, vm_block("one")) as vmd, vmd.client() as client:
        client.ask("start", name="one")
        client.ask("console", name="two\x1b[2J\n")
        client.send("stop", name="one", force=True, wait=True)
        client.receive()
        for line in (
            f"vmd: one: started by {user}\n",
            f"vmd: two\\x1b[2J\\x0a: console by {user} failed: no such VM\n",
            f"vmd: one: stopped by {user}\n",
        ):
            vmd.wait_for_log(line)
