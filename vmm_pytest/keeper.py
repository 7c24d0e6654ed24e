"""The process that a run's daemon ends with: `python -m vmm_pytest.keeper FOLDER NAME [SOCKET]`.

Each process that runs tests has a connection to it, which the kernel closes whatever ends that
process. Then the keeper ends the VMs of that process. With the last connection it ends the run: all
VMs whose names begin with NAME, the daemon unless it is that of SOCKET, and the folder. If the
keeper itself is killed, the kernel ends its daemon, and that its VMs.

It is made by a first process, which ends when clients are served, with a message if there is a
failure.
"""

import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from vmctl.client import Client, CommandError
from vmm_kvm.libc import LIBC
from vmm_kvm.standard_streams import open_standard_descriptors
from vmm_pytest.run import stop_all

_START_S = 90.0
_END_S = 60.0
_LOOK_S = 0.5
_MESSAGE_MAX = 4096
_LOG_SHOWN = 2000
_PR_SET_PDEATHSIG = 1
_READY = b"READY=1"


class _EndError(Exception):
    """A signal has ended the keeper."""


class Keeper:
    """See the module."""

    def __init__(self, folder: Path, name: str, daemon: str | None) -> None:
        """Start the daemon, unless it is there, and listen.

        Raises:
            CommandError: there is none.
            OSError: the folder takes no files.
        """
        self._folder = folder
        self._name = name
        self._process = None if daemon else _start_vmd(folder)
        self._daemon = daemon or str(folder / "vmd.sock")
        try:
            stop_all(self._daemon, f"{name}-", set())  # of a keeper that was killed
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            path = folder / "keeper"
            path.unlink(missing_ok=True)
            self._listener.bind(str(path))
            self._listener.listen(64)
        except BaseException:
            self._end_vmd()
            raise
        self._clients: dict[int, socket.socket] = {}
        self._prefixes: dict[int, str] = {}
        self._kept: set[str] = set()

    def run(self) -> None:
        """Serve until the last client has gone, and no VM is kept."""
        while self._clients or not self._can_end():
            self._serve(_LOOK_S)

    def close(self) -> None:
        """End all VMs of the run, the daemon if it is ours, and remove the folder."""
        with suppress(CommandError):  # it has ended before, and they with it
            stop_all(self._daemon, f"{self._name}-", self._kept)
        self._end_vmd()
        self._listener.close()
        for client in self._clients.values():
            client.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _serve(self, seconds: float) -> None:
        ready, _, _ = select.select([self._listener, *self._clients.values()], [], [], seconds)
        for one in ready:
            if one is self._listener:
                client, _ = one.accept()
                self._clients[client.fileno()] = client
            else:
                self._hear(one)

    def _hear(self, client: socket.socket) -> None:
        try:
            data = client.recv(_MESSAGE_MAX)
            if data:
                fields = json.loads(data)
                if "mine" in fields:
                    self._prefixes[client.fileno()] = str(fields["mine"])
                if "keep" in fields:
                    self._kept.add(str(fields["keep"]))
                client.send(b".")
                return
        except OSError:  # it was killed meanwhile
            pass
        prefix = self._prefixes.pop(client.fileno(), "")
        del self._clients[client.fileno()]
        client.close()
        if prefix:
            with suppress(CommandError):  # the daemon has ended, and they with it
                stop_all(self._daemon, prefix, self._kept)

    def _can_end(self) -> bool:
        """Take the lock of those who might connect; tells whether nobody has, or waits."""
        if self._process and self._process.poll() is not None:
            return True
        if self._process and self._kept:
            with Client(self._daemon) as client:
                self._kept &= {vm.name for vm in client.list()}
            if self._kept:
                return False
        fd = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        if select.select([self._listener], [], [], 0)[0]:
            os.close(fd)
            return False
        return True  # the lock ends with this process

    def _end_vmd(self) -> None:
        if not self._process:
            return
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _start_vmd(folder: Path) -> "subprocess.Popen[bytes]":
    """Start a daemon, and wait until it is ready."""
    config, log, notify = folder / "vm.conf", folder / "vmd.log", folder / "notify"
    config.write_text("")
    notify.unlink(missing_ok=True)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications,
        log.open("wb") as output,
    ):
        notifications.bind(str(notify))
        notifications.settimeout(0.1)
        arguments = ["-d", "--user", "--socket", str(folder / "vmd.sock"), "-f", str(config)]
        process = subprocess.Popen(
            [sys.executable, "-m", "vmd", *arguments],
            env={
                **os.environ,
                "NOTIFY_SOCKET": str(notify),
                "STATE_DIRECTORY": str(folder / "state"),
                "TMPDIR": str(folder),
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - this process has one thread
        )
        waited = 0.0
        while process.poll() is None and waited < _START_S:
            try:
                if _READY in notifications.recv(_MESSAGE_MAX):
                    return process
            except TimeoutError:
                waited += 0.1
    process.kill()
    process.wait()
    raise CommandError(log.read_text(errors="replace")[-_LOG_SHOWN:] or "vmd does not start")


def _die_with_parent() -> None:
    LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def main() -> int:
    """Be the first process, and then the keeper."""
    open_standard_descriptors()
    folder, name, *daemon = sys.argv[1:]
    read_fd, write_fd = os.pipe()
    if os.fork():
        os.close(write_fd)
        with open(read_fd) as told:  # noqa: PTH123 - a descriptor
            text = told.read()
        sys.stderr.write(text.removesuffix("ready"))
        sys.stderr.flush()
        os._exit(0 if text.endswith("ready") else 1)
    os.close(read_fd)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (1, 2):
        os.dup2(null, fd)
    os.close(null)

    def end(_number: int, _frame: FrameType | None) -> None:
        raise _EndError

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(write_fd, "w") as tell:  # noqa: PTH123 - a descriptor
        try:
            keeper = Keeper(Path(folder), name, daemon[0] if daemon else None)
        except (CommandError, OSError) as err:
            tell.write(str(err))
            shutil.rmtree(folder, ignore_errors=True)
            return 1
        tell.write("ready")
    with suppress(_EndError):
        keeper.run()
    keeper.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
