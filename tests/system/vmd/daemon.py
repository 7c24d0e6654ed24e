"""Run vmd in a test, and speak to it as a foreign client: sockets and JSON, none of our code."""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[3]
SELFTEST = ROOT / "bios" / "selftest.bin"
READY = b"selftest: ready"
TIMEOUT_S = 120.0
_PACKET_MAX = 1 << 20

Answer = dict[str, object]


def vm_block(
    name: str, *lines: str, enabled: bool = False, boot: Path = SELFTEST, memory: str = "64M"
) -> str:
    """Return a vm.conf block of a small VM that boots the self-test guest, or something else."""
    body = [f"memory {memory}", f'boot "{boot}"', "enable" if enabled else "disable", *lines]
    return "\n".join([f'vm "{name}" {{', *(f"\t{line}" for line in body), "}", ""])


class Client:
    """A connection to the control socket; a context manager."""

    def __init__(self, path: Path, timeout_s: float = TIMEOUT_S) -> None:
        """Connect; no answer may take longer than `timeout_s`."""
        self._timeout_s = timeout_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._socket.settimeout(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def send(self, kind: str, fds: tuple[int, ...] = (), **fields: object) -> None:
        """Send a request."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._socket.sendmsg([json.dumps({"type": kind, **fields}).encode()], rights)

    def receive(self) -> tuple[Answer, list[int]]:
        """Return the next answer, and its descriptors."""
        data, ancillary, _, _ = self._socket.recvmsg(_PACKET_MAX, 1024, socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise ConnectionError("the daemon closed the connection")
        fds = array.array("i")
        for _level, _type, block in ancillary:
            fds.frombytes(block)
        return json.loads(data), list(fds)

    def ask(self, kind: str, fds: tuple[int, ...] = (), **fields: object) -> Answer:
        """Send a request and return its answer, which has no descriptors."""
        self.send(kind, fds, **fields)
        answer, received = self.receive()
        assert received == []
        return answer

    def vms(self) -> list[Answer]:
        """Return the status of all VMs, which may come in parts."""
        self.send("status")
        found: list[Answer] = []
        while True:
            answer, _ = self.receive()
            part = answer["vms"]
            assert isinstance(part, list)
            found += part
            if not answer["has_more"]:
                return found

    def vm(self, name: str) -> Answer:
        """Return the status of one VM."""
        vms = self.ask("status", name=name)["vms"]
        assert isinstance(vms, list)
        assert len(vms) == 1, f"no VM {name}"
        found: Answer = vms[0]
        return found

    def wait_for_state(self, name: str, state: str) -> Answer:
        """Ask until a VM is in a state; returns its status."""
        deadline = time.monotonic() + self._timeout_s
        while (vm := self.vm(name))["state"] != state:
            assert time.monotonic() < deadline, f"{name} is {vm['state']}, not {state}"
            time.sleep(0.02)
        return vm

    def wait_for_reboot(self, name: str, pid: object) -> Answer:
        """Ask until a VM runs by another process than `pid`; returns its status."""
        deadline = time.monotonic() + self._timeout_s
        while (vm := self.wait_for_state(name, "running"))["pid"] == pid:
            assert time.monotonic() < deadline, f"{name} has not rebooted"
            time.sleep(0.02)
        return vm

    def console(self, name: str, on_output: Callable[[bytes], None] | None = None) -> Stream:
        """Attach to a VM's console; `on_output` gets its output, as it is read."""
        self.send("console", name=name)
        answer, fds = self.receive()
        assert answer["type"] == "console-opened", answer
        return Stream(fds[0], self._timeout_s, on_output)


class Stream:
    """A console's stream; a context manager."""

    def __init__(
        self,
        fd: int,
        timeout_s: float = TIMEOUT_S,
        on_output: Callable[[bytes], None] | None = None,
    ) -> None:
        """Take ownership of `fd`."""
        self._on_output = on_output
        self._socket = socket.socket(fileno=fd)
        self._socket.settimeout(timeout_s)
        self.output = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def expect(self, text: bytes, count: int = 1) -> None:
        """Read until `text` has appeared `count` times."""
        while self.output.count(text) < count:
            assert self._read(), f"the console ended: {self.output!r}"

    def type(self, data: bytes) -> None:
        """Type something."""
        self._socket.send(b"\0" + data)

    def read_to_end(self) -> None:
        """Read until the VM ends."""
        while self._read():
            pass

    def _read(self) -> bytes:
        data = self._socket.recv(_PACKET_MAX)
        self.output += data
        if self._on_output:
            self._on_output(data)
        return data


class Daemon:
    """A vmd in the foreground; a context manager, which waits until it is ready and ends it."""

    def __init__(
        self,
        directory: Path,
        config: str,
        *,
        is_user: bool = True,
        wait: bool = True,
        prefix: Sequence[str] = (),
        program: Sequence[str] = ("-m", "vmd"),
        interpreter: Path | str = sys.executable,
        options: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Start it in `directory`, with the text of a vm.conf; `prefix` are words before it.

        `program` is the program for Python, the `interpreter`; a test may have it patch something
        first.
        `environ` is added to the environment.
        """
        self.socket = directory / "vmd.sock"
        self.config = directory / "vm.conf"
        self.config.write_bytes(os.fsencode(config))
        self.log = directory / "log"
        notify = directory / "notify"
        notify.unlink(missing_ok=True)
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications,
            self.log.open("wb") as log,
        ):
            notifications.bind(str(notify))
            notifications.settimeout(0.1)
            self.process = subprocess.Popen(
                [
                    *prefix,
                    *(str(interpreter), *program, "-d", "-v"),
                    *(["--user"] if is_user else []),
                    *options,
                    *("--socket", str(self.socket), "-f", str(self.config)),
                ],
                cwd=ROOT,
                env={
                    **os.environ,
                    "NOTIFY_SOCKET": str(notify),
                    "STATE_DIRECTORY": str(directory / "state"),
                    **(environ or {}),
                },
                stdout=log,
                stderr=log,
            )
            if wait:
                self._wait(notifications)

    def _wait(self, notifications: socket.socket) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                if b"READY=1" in notifications.recv(4096):
                    return
            except TimeoutError:
                if self.process.poll() is not None:
                    break
        self.process.kill()
        self.process.wait()
        raise AssertionError(f"vmd did not start: {self.log.read_text()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def client(self, timeout_s: float = TIMEOUT_S) -> Client:
        """Connect to it."""
        return Client(self.socket, timeout_s)

    def stop(self) -> int:
        """End it by SIGTERM; returns the exit status, and fails if it leaves a process."""
        if self.process.returncode is None:
            pids = descendants(self.process.pid)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise
            left = [pid for pid in pids if is_alive(pid)]
            assert left == [], f"processes left behind: {left}: {self.log.read_text()}"
        return self.process.returncode

    def child(self, title: str) -> int:
        """Return the pid of the process with this title, such as `vmd: vmm` or `vm/alpine`."""
        # A new process has the zygote's title for a moment.
        below = children if title.startswith("vmd: ") else descendants
        found = [pid for pid in below(self.process.pid) if process_title(pid) == title[:15]]
        assert len(found) == 1, f"{title}: {found}"
        return found[0]

    def wait_for_child(self, title: str, parent: int | None = None) -> int:
        """Wait for a process with this title, a child of `parent` if given; returns its pid."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            for pid in children(parent) if parent else descendants(self.process.pid):
                if process_title(pid) == title:
                    return pid
            assert time.monotonic() < deadline, f"no process {title}"
            time.sleep(0.02)

    def wait_for_idle_child(self, title: str, parent: int | None = None) -> int:
        """Wait for a process with this title that waits for its work; returns its pid."""
        pid = self.wait_for_child(title, parent)
        deadline = time.monotonic() + TIMEOUT_S
        before = ""
        while (now := Path(f"/proc/{pid}/status").read_text()) != before or "S (sl" not in now:
            assert time.monotonic() < deadline, f"{title} does not wait"
            before = now  # with the number of times for which it has waited
            time.sleep(0.25)
        return pid

    def wait_for_log(self, text: str) -> None:
        """Wait until a text is in the log."""
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)


def vmctl(vmd: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    """Run vmctl against a daemon."""
    return subprocess.run(
        [sys.executable, "-m", "vmctl", *words],
        env={**os.environ, "VMD_SOCKET": str(vmd.socket)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def process_title(pid: int) -> str:
    """Return the kernel's name for a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_alive(pid: int) -> bool:
    """Tell whether a process exists; zombies do not count."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def children(pid: int) -> list[int]:
    """Return the pids of a process's children."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(word) for word in text.split()]


def descendants(pid: int) -> list[int]:
    """Return the pids of all processes below one."""
    found = children(pid)
    return [*found, *(below for child in found for below in descendants(child))]
