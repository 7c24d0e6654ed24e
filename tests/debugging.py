"""Guests of `vmctl run --gdb`, and debuggers for them: gdb itself, and one that sends anything."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from tests import debugged_guest as guest
from tests.vmctl_driver import vmctl_run
from vmm_kvm.gdb.packets import Packet, Reader, framed

DEADLINE_S = 60
_LISTENING = "00010000"  # __SO_ACCEPTCON, as /proc/net/unix shows it
PLAIN = {**os.environ, "TERM": "dumb", "LC_ALL": "C"}


@contextmanager
def debugged(tmp_path: Path, *options: str, ends: bool = False) -> Iterator[Path]:
    """Run the guest; yields its debugger's socket. Kill it at the end, or wait if it `ends`."""
    with debugged_process(tmp_path, *options, ends=ends) as (path, _):
        yield path


@contextmanager
def debugged_process(
    tmp_path: Path, *options: str, ends: bool = False
) -> Iterator[tuple[Path, int]]:
    """Run the guest as `debugged` does; yields its process too."""
    image, path = tmp_path / "guest.rom", tmp_path / "gdb"
    image.write_bytes(guest.make())
    words = ("--firmware", str(image), "-m", "4M", "-p", "2", "--gdb", f"{path}{''.join(options)}")
    vm = subprocess.Popen(
        vmctl_run(*words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        wait_for(path)
        yield path, vm.pid
        if ends:
            _, err = vm.communicate(timeout=DEADLINE_S)
            assert (vm.returncode, err) == (guest.END_STATUS, b"")
        else:
            assert vm.poll() is None
    finally:
        vm.kill()
        vm.communicate()


def wait_for(path: Path) -> None:
    """Wait until a program listens at a socket."""
    end = time.monotonic() + DEADLINE_S
    while not re.search(
        rf" {_LISTENING} 0001 .* {re.escape(str(path))}$",
        Path("/proc/net/unix").read_text(encoding="utf-8"),
        re.MULTILINE,
    ):
        assert time.monotonic() < end
        time.sleep(0.02)


def run_gdb(path: Path, script: str, end: str = "detach") -> str:
    """Run gdb with a script; returns its output."""
    words = ["gdb", "-nx", "-batch", "-ex", "set confirm off", "-ex", "set width 0"]
    for line in (f"target remote {path}", *script.strip().splitlines(), end):
        words += ["-ex", line]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=DEADLINE_S, check=False, env=PLAIN
    )
    return done.stdout


class Conversation:
    """A debugger of our own, which sends packets that gdb would not."""

    def __init__(self, sock: socket.socket) -> None:
        """Talk through `sock`, and take ownership of it."""
        self.sock = sock
        self.sock.settimeout(DEADLINE_S)
        self._reader = Reader()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def ask(self, packet: bytes) -> bytes:
        """Send a packet, and return its answer."""
        self.send(packet)
        return self.answer()

    def send(self, packet: bytes) -> None:
        """Send a packet."""
        self.sock.sendall(framed(packet))

    def answer(self) -> bytes:
        """Return the next packet; empty at the end."""
        while True:
            received = self._reader.next()
            if isinstance(received, Packet):
                return received.text
            data = self.sock.recv(65536)
            if not data:
                return b""
            self._reader.feed(data)


class Client(Conversation):
    """A debugger of the guest, connected to its socket."""

    def __init__(self, path: Path) -> None:
        """Connect to `path`."""
        super().__init__(socket.socket(socket.AF_UNIX))
        self.sock.connect(str(path))

    def counter(self, address: int = guest.COUNTER) -> int:
        """Return a counter of the guest, which is stopped."""
        return int.from_bytes(bytes.fromhex(self.ask(b"m%x,4" % address).decode()), "little")
