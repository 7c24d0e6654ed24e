"""`vmm-blk` as a command: its options, its end, and guests of QEMU that boot from it."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests import artifacts
from tests.closed_streams import COMBINATIONS, closing
from tests.system.vhost_user_guests import (
    BOOT_MESSAGE,
    BOOT_STATUS,
    boot_disk,
    disk_initramfs,
)
from tests.unit.virtio.vhost_user.rig import VERSION_1, connect, driver
from tests.vmctl_driver import ROOT, ConsoleProcess
from vmm_kvm.virtio.vhost_user.client import Client

PYTHON = str(ROOT / ".venv" / "bin" / "python")
MIB = 1 << 20
TIMEOUT_S = 20
GUEST_S = 180
"""The limit for a Linux guest under full emulation, on a busy machine."""
READ, WRITE = 0, 1


def command(*arguments: str | Path, closed: str = "") -> list[str]:
    """Return the argument vector of vmm-blk with these arguments, started with `closed` closed."""
    words = [PYTHON, "-m", "vmm_kvm.commands.vmm_blk", *(str(argument) for argument in arguments)]
    return closing(closed, words) if closed else words


def result(*arguments: str | Path) -> tuple[int, str, str]:
    """Run vmm-blk to its end; return status, output and errors."""
    done = subprocess.run(
        command(*arguments),
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
    )
    return done.returncode, done.stdout, done.stderr


class Running:
    """A running vmm-blk; `errors` is its standard error, after its end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.errors = ""

    def end(self, number: signal.Signals | None = signal.SIGTERM) -> int:
        """Send it a signal, or none, and return its exit status."""
        if number is not None:
            self.process.send_signal(number)
        self.errors += self.process.communicate(timeout=TIMEOUT_S)[1]
        return self.process.returncode


@contextmanager
def serving(
    path: Path, *arguments: str | Path, pass_fds: Sequence[int] = (), closed: str = ""
) -> Iterator[Running]:
    """Run vmm-blk and wait until it listens at `path`, if that is among the arguments."""
    with subprocess.Popen(
        command(*arguments, closed=closed),
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        pass_fds=pass_fds,
    ) as process:
        try:
            if path in arguments:
                wait_for_socket(path, process)
            yield Running(process)
        finally:
            process.kill()


def wait_for_socket(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a program listens at `path`."""
    pidfd = os.pidfd_open(process.pid)
    try:
        while True:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(str(path))
                except OSError:
                    assert not select.select([pidfd], [], [], 0.02)[0], "it has ended"
                else:
                    return
    finally:
        os.close(pidfd)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 1 MiB; its first sector says so."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"first sector".ljust(512, b".") + bytes(MIB - 512))
    return path


def request(kind: int, sector: int, data: bytes = b"") -> bytes:
    """Return a request of virtio-blk as the driver writes it: a header, and data to write."""
    return kind.to_bytes(8, "little") + sector.to_bytes(8, "little") + data


def test_capabilities() -> None:
    """`--print-capabilities` prints JSON for management tools."""
    status, out, errors = result("--print-capabilities")
    assert (status, errors) == (0, "")
    assert json.loads(out) == {"type": "block", "features": ["read-only", "blk-file"]}


def test_errors_are_one_line(tmp_path: Path, image: Path) -> None:
    """An error names the file or socket that cannot be opened."""
    path = tmp_path / "disk.sock"
    nowhere = tmp_path / "nowhere"
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        (("--socket", path, nowhere), f"vmm-blk: {nowhere}: No such file or directory\n"),
        (("--socket", nowhere / "x", image), f"vmm-blk: {nowhere}/x: No such file or directory\n"),
        (("--socket", image, image), f"vmm-blk: {image}: is there, and no socket\n"),
        (("--fd", "77", image), "vmm-blk: descriptor 77: Bad file descriptor\n"),
        (("--fd", "0", image), "vmm-blk: descriptor 0: "),
        (("--format", "qcow2", "--socket", path, image), f"vmm-blk: {image}: "),
    ]
    for arguments, line in cases:
        status, out, errors = result(*arguments)
        assert (status, out, errors.count("\n")) == (1, "", 1), errors
        assert errors.startswith(line)
    assert not path.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["image"],
        ["--socket", "a", "--fd", "3", "image"],
        ["--socket", "a"],
        ["--socket", "a", "--format", "vmdk", "image"],
        ["--socket", "a", "--queues", "65", "image"],
    ],
)
def test_misuse(arguments: list[str]) -> None:
    """Wrong options end with the usage and status 2."""
    status, out, errors = result(*arguments)
    assert (status, out) == (2, "")
    assert errors.startswith("usage: vmm-blk ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(tmp_path: Path, image: Path, number: signal.Signals) -> None:
    """At a signal it removes its socket, prints nothing and exits 0, even with a front-end."""
    path = tmp_path / "disk.sock"
    with serving(path, "--socket", path, image) as server, connect(str(path)):
        assert server.end(number) == 0
        assert server.errors == ""
        assert not path.exists()


def test_many_signals_end_it_once(tmp_path: Path, image: Path) -> None:
    """Further signals neither cut short the closing of the image, nor are an error."""
    path = tmp_path / "disk.sock"
    with serving(path, "--socket", path, image) as server, connect(str(path)):
        for _ in range(50):
            server.process.send_signal(signal.SIGINT)
            server.process.send_signal(signal.SIGTERM)
        # A signal after everything is closed may still end the interpreter.
        assert server.end(None) in {0, -signal.SIGTERM, -signal.SIGINT}
        assert server.errors == ""
        assert not path.exists()


def test_requests(tmp_path: Path, image: Path) -> None:
    """Sectors are read and written; the image holds the driver's writes."""
    path = tmp_path / "disk.sock"
    with serving(path, "--socket", path, image) as server:
        with driver() as guest, connect(str(path)) as client:
            guest.start(client)
            answer = guest.request(request(READ, 0), size=513)
            assert answer == b"first sector".ljust(512, b".") + b"\0"
            data = bytes(range(256)) * 4
            assert guest.request(request(WRITE, 3, data), size=1) == b"\0"
            assert guest.request(request(READ, 2047), size=1025)[-1] == 1  # beyond the end
        assert server.end() == 0
    assert image.read_bytes()[3 * 512 : 5 * 512] == data


@pytest.mark.parametrize("closed", COMBINATIONS)
def test_closed_descriptors(closed: str, tmp_path: Path, image: Path) -> None:
    """Whichever descriptors are closed at the start, the image holds only the drivers' writes."""
    path = tmp_path / "disk.sock"
    expected = bytearray(image.read_bytes())
    expected[3 * 512 : 4 * 512] = b"w" * 512
    with serving(path, "--socket", path, image, closed=closed) as server:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bad:
            bad.connect(str(path))
            bad.sendall(b"GET / HTTP/1.1\r\n\r\n")  # it logs an error about this
            with suppress(ConnectionResetError):
                assert bad.recv(100) == b""
        with driver() as guest, connect(str(path)) as client:
            guest.start(client)
            assert guest.request(request(WRITE, 3, b"w" * 512), size=1) == b"\0"
        assert server.end() == 0
    assert image.read_bytes() == bytes(expected)


def test_read_only(tmp_path: Path, image: Path) -> None:
    """With --read-only writes are refused, and the image needs no write permission."""
    path = tmp_path / "disk.sock"
    before = image.read_bytes()
    image.chmod(0o400)
    with serving(path, "--socket", path, "--read-only", image) as server:
        with driver() as guest, connect(str(path)) as client:
            assert client.features >> 5 & 1
            guest.start(client, VERSION_1 | 1 << 5)
            assert guest.request(request(WRITE, 0, bytes(512)), size=1) == b"\1"
        assert server.end() == 0
    assert image.read_bytes() == before


def test_a_connected_descriptor(image: Path) -> None:
    """With a connected socket it serves that connection and ends with it."""
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    with serving(Path(), "--fd", str(fd), "--blk-file", image, pass_fds=[fd]) as server:
        theirs.close()
        with driver() as guest, Client(ours) as client:
            guest.start(client)
            assert guest.request(request(READ, 0), size=513)[:5] == b"first"
        assert server.end(None) == 0
        assert server.errors == ""


def test_one_shot(tmp_path: Path, image: Path) -> None:
    """With --one-shot it ends with the first connection."""
    path = tmp_path / "disk.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    fd = listener.fileno()
    with serving(Path(), "--fd", str(fd), "--one-shot", image, pass_fds=[fd]) as server:
        listener.close()
        connect(str(path)).close()
        assert server.end(None) == 0


def test_a_bad_front_end_costs_one_line(tmp_path: Path, image: Path) -> None:
    """A front-end that breaks the protocol loses its connection; the next one is served."""
    path = tmp_path / "disk.sock"
    with serving(path, "--socket", path, image) as server:
        for _ in range(3):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bad:
                bad.connect(str(path))
                bad.sendall(b"GET / HTTP/1.1\r\n\r\n")
                with suppress(ConnectionResetError):
                    assert bad.recv(100) == b""
        with connect(str(path)) as client:
            assert client.queue_count() == 1
        assert server.end() == 0
    assert server.errors == "vmm-blk: protocol version 3, not 1\n" * 3


# Guests of QEMU


def qemu(path: Path, *arguments: str, reconnects: bool = False) -> list[str]:
    """Return the argument vector of a QEMU with the disk served at `path`."""
    again = ",reconnect-ms=100" if reconnects else ""
    return [
        *("qemu-system-x86_64", "-accel", "tcg", "-m", "256M"),
        *("-object", "memory-backend-memfd,id=ram,size=256M,share=on"),
        *("-machine", "q35,memory-backend=ram", "-nodefaults", "-no-user-config"),
        *("-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-chardev", f"socket,id=disk,path={path}{again}"),
        *("-device", "isa-debug-exit,iobase=0xf4,iosize=4", *arguments),
    ]


DEVICE = "vhost-user-blk-pci,chardev=disk"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_seabios_boots(tmp_path: Path) -> None:
    """SeaBIOS, a driver without interrupts, reads the boot sector and a guest the next one."""
    path, image = tmp_path / "disk.sock", tmp_path / "disk.img"
    image.write_bytes(boot_disk())
    with serving(path, "--socket", path, image) as server:
        with ConsoleProcess(qemu(path, "-device", f"{DEVICE},bootindex=0")) as guest:
            guest.expect(BOOT_MESSAGE.decode().strip(), TIMEOUT_S * 3)
            assert guest.wait() == BOOT_STATUS
        assert server.end() == 0
    assert server.errors == ""


def _report(path: Path, device: str, *, cpus: int = 1) -> tuple[dict[str, list[str]], str]:
    """Boot a Debian kernel with the disk; return its report, by first word, and QEMU's errors."""
    kernel = artifacts.kernel("cloud")
    boot = ["-kernel", str(kernel.vmlinuz), "-initrd", str(disk_initramfs(kernel))]
    boot += ["-append", "console=ttyS0 quiet", "-smp", str(cpus), "-device", device]
    with ConsoleProcess(qemu(path, *boot)) as guest:
        guest.expect("disk: end", GUEST_S)
        assert guest.wait() == 0
        found: dict[str, list[str]] = {}
        text = guest.output.decode(errors="replace")
        for word, rest in re.findall(r"^disk: (\w+) ?(.*?)\r?$", text, re.MULTILINE):
            found.setdefault(word, []).append(rest)
        return found, guest.errors.decode()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_linux_uses_the_disk(tmp_path: Path, disk_format: str) -> None:
    """A Debian kernel under QEMU reads, writes, flushes, zeroes and discards."""
    path, image = tmp_path / "disk.sock", tmp_path / "disk.img"
    subprocess.run(["qemu-img", "create", "-q", "-f", disk_format, image, "32M"], check=True)
    qemu_io(image, disk_format, "write -P 65 0 512")
    with serving(path, "--socket", path, "--serial", "ours", image) as server:
        found, errors = _report(path, DEVICE)
        assert server.end() == 0
    assert (server.errors, errors) == ("", "")
    assert found == {
        "size": ["65536 ro 0 serial ours queues 1"],
        "first": ["A" * 16],
        "same": ["yes", "yes"],
        "zeroes": ["0"],
        "end": [""],
    }
    if disk_format == "qcow2":
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", image], check=True)
    shown = qemu_io(image, disk_format, "read -P 0 4M 64k")
    assert "read 65536/65536 bytes" in shown
    assert "verification failed" not in shown


def qemu_io(image: Path, disk_format: str, order: str) -> str:
    """Run a command of qemu-io on an image; return its output."""
    arguments = ["qemu-io", "-f", disk_format, "-c", order, str(image)]
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_linux_sees_a_read_only_disk_with_several_queues(tmp_path: Path, image: Path) -> None:
    """QEMU uses as many queues as it has vCPUs, and no write reaches a read-only disk."""
    path = tmp_path / "disk.sock"
    before = image.read_bytes()
    with serving(path, "--socket", path, "--read-only", "--queues", "4", image) as server:
        found, _ = _report(path, f"{DEVICE},num-queues=2", cpus=2)
        assert server.end() == 0
    assert server.errors == ""
    assert found["size"] == ["2048 ro 1 serial  queues 2"]
    assert found["first"] == ["first sector...."]
    assert image.read_bytes() == before


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_guest_reboots(tmp_path: Path, image: Path) -> None:
    """At a reboot QEMU resets the device and starts it again over the same connection."""
    path = tmp_path / "disk.sock"
    kernel = artifacts.kernel("cloud")
    boot = ["-kernel", str(kernel.vmlinuz), "-initrd", str(disk_initramfs(kernel))]
    boot += ["-append", "console=ttyS0 quiet reboot=k test=again", "-device", DEVICE]
    arguments = [word for word in qemu(path, *boot) if word != "-no-reboot"]
    with serving(path, "--socket", path, image) as server:
        with ConsoleProcess(arguments) as guest:
            guest.expect("disk: end", GUEST_S)
            assert guest.wait() == 0
            assert guest.output.count(b"init: up") == 2
        assert server.end() == 0
    assert server.errors == ""
    assert image.read_bytes()[:6] == b"again\n"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_successor_goes_on_after_a_crash(tmp_path: Path) -> None:
    """After a kill under load QEMU connects to a new server, and no data are lost."""
    path, image = tmp_path / "disk.sock", tmp_path / "disk.img"
    image.write_bytes(bytes(16 * MIB))
    kernel = artifacts.kernel("cloud")
    boot = ["-kernel", str(kernel.vmlinuz), "-initrd", str(disk_initramfs(kernel))]
    boot += ["-append", "console=ttyS0 quiet test=crash", "-device", DEVICE]
    with ExitStack() as stack:
        server = stack.enter_context(serving(path, "--socket", path, image))
        guest = stack.enter_context(ConsoleProcess(qemu(path, *boot, reconnects=True)))
        guest.expect("disk: writing", GUEST_S)
        for _ in range(3):
            before = written(server)
            while written(server) < before + 2 * MIB:
                assert server.process.poll() is None
                time.sleep(0.01)
            server.process.kill()
            server.process.wait()
            server = stack.enter_context(serving(path, "--socket", path, image))
        guest.expect("disk: end", GUEST_S)
        assert guest.wait() == 0
        assert guest.output.count(b"disk: same yes") == 3
        assert server.end() == 0


def written(server: Running) -> int:
    """Return the number of bytes that a server has written."""
    counts = Path(f"/proc/{server.process.pid}/io").read_text()
    found = re.search(r"^wchar: (\d+)$", counts, re.MULTILINE)
    assert found is not None
    return int(found[1])
