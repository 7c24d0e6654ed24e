"""Networks under unmodified Debian kernels: every way that frames can take."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests import artifacts
from tests.guest.linux_guest import COMMAND_LINE, MIB, Shell
from tests.guest.networks import GUEST, GUEST6, HOST, HOST6, TAP, Namespace, network
from tests.vmctl_driver import ConsoleProcess, vmctl_run

pytestmark = [
    *(pytest.mark.guest, pytest.mark.root, pytest.mark.slow),
    pytest.mark.timeout(900),
]

BOOT_S = 300.0
PORT = 5000
SIZE = 8 * MIB
PATHS = {"vhost": "", "thread": ",user", "process": ",process"}


@contextmanager
def booted(
    where: Namespace, nic: str, *, kernel: str = "6.1-cloud", cpus: int = 1, append: str = ""
) -> Iterator[Shell]:
    """Boot a guest to its shell in a namespace; its interface has an address then."""
    booted_kernel = artifacts.kernel(kernel)
    arguments = vmctl_run(
        *("-m", "256M", "-p", str(cpus), "-b", booted_kernel.vmlinuz, "-i", nic),
        *("--initrd", artifacts.net_initramfs(booted_kernel)),
        *("--append", f"{COMMAND_LINE} {append} test=shell"),
    )
    with ConsoleProcess(where.command(*arguments)) as console:
        console.expect("# ", BOOT_S)
        shell = Shell(console)
        shell.run("dmesg -n 1; ip link set lo up")
        shell.run("echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad")
        shell.run(f"ip addr add {GUEST}/24 dev eth0 && ip addr add {GUEST6}/64 dev eth0")
        shell.run("ip link set eth0 up")
        yield shell


def features(shell: Shell) -> set[int]:
    """Return the bits that the driver and the device agreed on."""
    shown = shell.run("cat /sys/class/net/eth0/device/features")
    return {number for number, bit in enumerate(shown) if bit == "1"}


# One connection: send a file and close, or take everything and tell its digest.
_PEER = """
import hashlib, pathlib, socket, sys
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
connection, _ = server.accept()
if len(sys.argv) > 3:
    connection.sendall(pathlib.Path(sys.argv[3]).read_bytes())
    connection.shutdown(socket.SHUT_WR)
with connection.makefile("rb") as received:
    print(hashlib.file_digest(received, "md5").hexdigest())
"""


@contextmanager
def peer(where: Namespace, *arguments: str) -> Iterator[IO[bytes]]:
    """Run the other end of a connection on the host's side; what it prints is yielded."""
    with subprocess.Popen(
        where.command(sys.executable, "-c", _PEER, HOST, str(PORT), *arguments),
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.stdout


def transfer(where: Namespace, shell: Shell, tmp_path: Path) -> None:
    """Send a file each way over TCP; what arrives is what was sent."""
    data = b"".join(hashlib.sha256(i.to_bytes(8, "big")).digest() for i in range(SIZE // 32))
    source = tmp_path / "source"
    source.write_bytes(data)
    expected = hashlib.md5(data).hexdigest()
    with peer(where, str(source)):
        shell.run(f"nc {HOST} {PORT} </dev/null >/data")
    assert shell.run("md5sum </data").split()[0] == expected
    with peer(where) as told:
        shell.run(f"nc {HOST} {PORT} </data")
        assert told.read().decode().strip() == expected


@pytest.mark.parametrize("path", list(PATHS))
def test_a_guest_and_its_host_talk(path: str, tmp_path: Path) -> None:
    """Ping by IPv4 and IPv6 loses nothing, and TCP brings files over whole, on every data path."""
    with network() as where, booted(where, f"tap:{TAP},mtu=1500{PATHS[path]}") as shell:
        for target in (HOST, HOST6):
            assert " 0% packet loss" in shell.run(f"ping -c 5 -i 0.2 {target}")
        for target in (GUEST, GUEST6):
            shown = where.run("busybox", "ping", "-c", "5", "-i", "0.2", target)
            assert " 0% packet loss" in shown
        transfer(where, shell, tmp_path)
        shell.power_off()
