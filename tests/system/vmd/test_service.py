"""The daemon under a service manager: a socket that is there already, and a watchdog."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.vmd.daemon import ROOT, TIMEOUT_S, Client, vm_block
from vmd.shared import log

pytestmark = pytest.mark.kvm

WATCHDOG_S = 0.4
# As a service manager does between fork and exec: the socket becomes descriptor 3.
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
    """Clients are served on it, those too that came before the daemon; it is not removed."""
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
    """A daemon that goes round says so twice in each interval; one that hangs does not."""
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
        for line in ("two", "lines"):
            assert syslog.recv(4096).decode() == f"<28>vmd[{pid}]: vm/alpine: {line}"
