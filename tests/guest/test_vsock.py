"""virtio-vsock with Linux's driver: megabytes in both directions, by `vmctl run` and under vmd."""

from __future__ import annotations

import hashlib
import random
import socket
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import artifacts
from tests.guest.linux_guest import COMMAND_LINE, Shell
from tests.guest.tools import UNPACK
from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import Daemon, Stream, vm_block
from tests.vmctl_driver import BOOT_TIMEOUT_S, ConsoleProcess, vmctl_run
from vmctl.client import Client

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(600)]

SIZE = 10 << 20
COMMAND_S = 240.0
MODULES = ("virtio_pci", "virtio_blk", "vmw_vsock_virtio_transport")
SOURCE = Path(__file__).with_name("vsock_cat.c")
_BLOCK = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk with the guest's program and ten megabytes."""
    program, data = tmp_path / "vsock-cat", tmp_path / "data"
    subprocess.run(["gcc", "-O1", "-static", "-o", program, SOURCE], check=True)
    data.write_bytes(random.Random(1).randbytes(SIZE))
    disk = tmp_path / "disk"
    with tarfile.open(disk, "w") as archive:
        archive.add(program, arcname="bin/vsock-cat")
        archive.add(data, arcname="data")
    with disk.open("ab") as image:
        image.truncate(-(-image.tell() // _BLOCK) * _BLOCK)
    return disk


def md5(data: bytes) -> str:
    """Return the digest as md5sum prints it."""
    return hashlib.md5(data).hexdigest()


def exchange(sock: socket.socket, data: bytes) -> bytes:
    """Send all data and shut down, while reading to the end; closes the socket."""
    received = bytearray()

    def write() -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    writer = threading.Thread(target=write)
    with sock:
        sock.settimeout(COMMAND_S)
        writer.start()
        while piece := sock.recv(1 << 16):
            received += piece
        writer.join()
    return bytes(received)


def connected(path: Path, port: int) -> socket.socket:
    """Connect to a port of the guest by the socket of `vmctl run`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(COMMAND_S)
    sock.connect(str(path))
    sock.sendall(b"CONNECT %d\n" % port)
    assert sock.recv(3) == b"OK "
    while sock.recv(1) != b"\n":
        pass
    return sock


@contextmanager
def accepting(path: Path) -> Iterator[socket.socket]:
    """Listen for connections of the guest."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.settimeout(COMMAND_S)
        listener.bind(str(path))
        listener.listen()
        yield listener


def test_both_sides_connect(disk: Path, tmp_path: Path) -> None:
    """Either side opens a connection: both directions carry data at once, compared by digests."""
    data, path = random.Random(2).randbytes(SIZE), tmp_path / "vsock"
    theirs = (tmp_path / "data").read_bytes()
    kernel = artifacts.kernel("cloud")
    arguments = vmctl_run(
        *("-m", "256M", "-b", kernel.vmlinuz, "-d", f"raw:{disk},ro", "--vsock", path),
        *("--initrd", artifacts.initramfs_with(kernel, MODULES, "vsock")),
        *("--append", f"{COMMAND_LINE} test=shell"),
    )
    with ConsoleProcess(arguments) as console, accepting(tmp_path / "vsock_7") as listener:
        console.expect("# ")
        shell = Shell(console)
        shell.run(UNPACK, COMMAND_S)
        assert "Connection reset" in shell.run("vsock-cat connect 8 </dev/null 2>&1; true")
        console.send("vsock-cat listen 1000 </data >/got\n")
        console.expect("vsock-cat: listening")
        assert exchange(connected(path, 1000), data) == theirs
        assert shell.run("md5sum </got", COMMAND_S).split()[0] == md5(data)
        console.send("vsock-cat connect 7 </data >/got\n")
        sock, _ = listener.accept()
        assert exchange(sock, data) == theirs
        assert shell.run("md5sum </got", COMMAND_S).split()[0] == md5(data)
        shell.power_off()
    assert not path.exists()


@needs_separation
def test_under_vmd(disk: Path, tmp_path: Path) -> None:
    """The same with a confined VM process of the daemon; and after a pause."""
    data = random.Random(2).randbytes(SIZE)
    kernel = artifacts.kernel("cloud")
    lines = (
        *(f'initrd "{artifacts.initramfs_with(kernel, MODULES, "vsock")}"', "vsock"),
        *(f'append "{COMMAND_LINE} test=shell"', f'disk "{disk}" format raw {{ ro }}'),
    )
    config = vm_block("linux", *lines, boot=kernel.vmlinuz, memory="256M", enabled=True)
    with Daemon(tmp_path, config, is_user=False) as vmd, Client(str(vmd.socket)) as client:
        with vmd.client(BOOT_TIMEOUT_S) as other:
            other.wait_for_state("linux", "running")
            console = other.console("linux")
        with console:
            console.expect(b"# ")
            _type(console, f"{UNPACK}; echo unpack''ed", b"unpacked")
            _type(console, "vsock-cat listen 1000 </data >/got", b"vsock-cat: listening")
            sock = client.connect("linux", 1000, timeout=COMMAND_S)
            client.pause("linux")
            client.unpause("linux")
            assert exchange(sock, data) == (tmp_path / "data").read_bytes()
            _type(console, "md5sum </got", md5(data).encode())
        client.stop("linux", force=True)


def _type(console: Stream, command: str, answer: bytes) -> None:
    console.type(command.encode() + b"\n")
    console.expect(answer)
