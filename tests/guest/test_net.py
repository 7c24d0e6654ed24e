"""Networks under unmodified Debian kernels, on every data path."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests import artifacts
from tests.guest.linux_guest import COMMAND_LINE, MIB, Shell
from tests.guest.networks import (
    Namespace,
    guest,
    guest6,
    host,
    host6,
    namespace,
    network,
)
from tests.vmctl_driver import ROOT, ConsoleProcess, vmctl_run
from vmm_kvm.virtio import abi

pytestmark = [
    *(pytest.mark.guest, pytest.mark.root, pytest.mark.slow),
    pytest.mark.timeout(900),
]

BOOT_S = 300.0
PORT = 5000
SIZE = 8 * MIB
ANSWERED = " 0% packet loss"
PATHS = {"vhost": "", "thread": ",user", "process": ",process"}


@contextmanager
def booted(
    where: Namespace,
    *nics: str,
    kernel: str = "cloud",
    cpus: int = 1,
    append: str = "",
    initrd: Path | None = None,
) -> Iterator[Shell]:
    """Boot a guest to its shell in a namespace."""
    booted_kernel = artifacts.kernel(kernel)
    arguments = vmctl_run(
        *("-m", "256M", "-p", str(cpus), "-b", booted_kernel.vmlinuz),
        *(word for nic in nics for word in ("-i", nic)),
        *("--initrd", initrd or artifacts.net_initramfs(booted_kernel)),
        *("--append", f"{COMMAND_LINE} {append} test=shell"),
    )
    with ConsoleProcess(where.command(*arguments)) as console:
        console.expect("# ", BOOT_S)
        yield Shell(console)


@contextmanager
def qemus(where: Namespace, tap: str) -> Iterator[Shell]:
    """Boot the same guest under QEMU, with vhost-net."""
    kernel = artifacts.kernel("cloud")
    arguments = (
        *("qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "256M", "-nodefaults"),
        *("-no-user-config", "-display", "none", "-serial", "stdio"),
        *("-kernel", str(kernel.vmlinuz), "-initrd", str(artifacts.net_initramfs(kernel))),
        *("-append", f"{COMMAND_LINE} test=shell"),
        *("-netdev", f"tap,id=n,ifname={tap},script=no,downscript=no,vhost=on"),
        *("-device", "virtio-net-pci,netdev=n,disable-legacy=on,romfile="),
    )
    with ConsoleProcess(where.command(*arguments)) as console:
        console.expect("# ", BOOT_S)
        yield Shell(console)


def configure(shell: Shell, count: int = 1) -> None:
    """Give the guest's interfaces their addresses."""
    shell.run("dmesg -n 1; ip link set lo up")
    for number in range(count):
        name = f"eth{number}"
        shell.run(f"echo 0 >/proc/sys/net/ipv6/conf/{name}/accept_dad")
        shell.run(f"ip addr add {guest(number)}/24 dev {name}")
        shell.run(f"ip addr add {guest6(number)}/64 dev {name}")
        shell.run(f"ip link set {name} up")


def answers(shell: Shell, number: int = 0, *, size: int = 56) -> bool:
    """Tell whether the host answers every ping of the guest."""
    shown = shell.run(f"ping -c 5 -i 0.2 -W 2 -s {size} {host(number)}; true")
    return " 0% packet loss" in shown


def features(shell: Shell, number: int = 0) -> set[int]:
    """Return the feature bits that driver and device negotiated."""
    shown = shell.run(f"cat /sys/class/net/eth{number}/device/features")
    return {number for number, bit in enumerate(shown) if bit == "1"}


# One connection: send a file and close, or receive everything and print its digest.
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
def peer(where: Namespace, *arguments: str, address: str = "0.0.0.0") -> Iterator[IO[bytes]]:
    """Run the other end of a connection on the host's side; yields its output.

    It is killed at the end: with a proxy between, it may never learn that the guest has closed.
    """
    with subprocess.Popen(
        where.command(sys.executable, "-c", _PEER, address, str(PORT), *arguments),
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield process.stdout
        finally:
            process.kill()


def transfer(where: Namespace, shell: Shell, tmp_path: Path) -> None:
    """Send a file each way over TCP; it must arrive unchanged."""
    data = b"".join(hashlib.sha256(i.to_bytes(8, "big")).digest() for i in range(SIZE // 32))
    source = tmp_path / "source"
    source.write_bytes(data)
    expected = hashlib.md5(data).hexdigest()
    with peer(where, str(source)):
        shell.run(f"nc {host()} {PORT} </dev/null >/data")
    assert shell.run("md5sum </data").split()[0] == expected
    with peer(where) as told:
        shell.run(f"nc {host()} {PORT} </data")
        assert told.read().decode().strip() == expected


@pytest.mark.parametrize("path", list(PATHS))
def test_a_guest_and_its_host_talk(path: str, tmp_path: Path) -> None:
    """On every data path IPv4 and IPv6 pings are answered, and TCP transfers whole files."""
    with network() as where, booted(where, f"tap:tap0{PATHS[path]}") as shell:
        configure(shell)
        for target in (host(), host6()):
            assert " 0% packet loss" in shell.run(f"ping -c 5 -i 0.2 {target}")
        for target in (guest(), guest6()):
            shown = where.run("busybox", "ping", "-c", "5", "-i", "0.2", target)
            assert " 0% packet loss" in shown
        transfer(where, shell, tmp_path)
        shell.power_off()


def test_a_server_of_another_program(tmp_path: Path) -> None:
    """A vhost-user-net server with queue pairs, and no other features, moves the frames too."""
    path = tmp_path / "socket"
    with network(queues=2) as where:
        command = where.command(
            *(sys.executable, "-m", "vmm_kvm.commands.vmm_net", "--socket", str(path)),
            *("--queues", "2", "tap0"),
        )
        with subprocess.Popen(command, cwd=ROOT) as server:
            try:
                while not path.exists():
                    assert server.poll() is None
                    time.sleep(0.1)
                with booted(where, f"vhost-user:{path},queues=2", cpus=2) as shell:
                    configure(shell)
                    assert abi.VIRTIO_NET_F_MQ in features(shell)
                    assert answers(shell)
                    transfer(where, shell, tmp_path)
                    shell.power_off()
            finally:
                server.terminate()


def test_queues_sizes_and_locks(tmp_path: Path) -> None:
    """Two queue pairs, packets of 9000 bytes, and a locked address, also after a reboot.

    vhost-net moves the frames of the first interface, the VM's process those of the locked second.
    """
    nics = ("tap:tap0,queues=2,mtu=9000", "tap:tap1,queues=2,mtu=9000,locked")
    with network(2, queues=2, mtu=9000) as where, booted(where, *nics, cpus=2) as shell:
        for is_first in (True, False):
            configure(shell, 2)
            for number in range(2):
                assert abi.VIRTIO_NET_F_MQ in features(shell, number)
                assert shell.run(f"cat /sys/class/net/eth{number}/mtu") == "9000"
                assert answers(shell, number, size=8972)
            assert shell.run("grep ^Ip: /proc/net/snmp | tail -n 1").split()[-1] == "0"
            transfer(where, shell, tmp_path)
            mine = shell.run("cat /sys/class/net/eth1/address")
            shell.run("ip link set eth1 address 02:00:00:00:00:01")
            assert not answers(shell, 1)
            shell.run(f"ip link set eth1 address {mine}")
            assert answers(shell, 1)
            if is_first:
                shell.console.send("reboot -f\n")
                shell.console.expect("init: up", BOOT_S)
                shell.console.expect("# ", BOOT_S)
        shell.console.send("poweroff -f\n")
        assert shell.console.wait() == 0
        assert b"bad source address 02:00:00:00:00:01" in shell.console.errors


# Broadcasts, with pauses in which vhost-net refills its buffers.
_FLOOD = """
import socket, sys, time
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as out:
    out.bind((sys.argv[1], 0))
    for number in range(int(sys.argv[2])):
        out.send(bytes.fromhex("ff" * 6 + "00" * 6 + "88b5") + bytes(46))
        if number % 100 == 0:
            time.sleep(0.05)
"""


def waiting(where: Namespace, shell: Shell, tap: str) -> int:
    """Return the largest number of frames that wait for a guest before one is dropped."""
    count = 4000
    dropped = f"/sys/class/net/{tap}/statistics/tx_dropped"
    shell.run("ip link set eth0 up")
    os.killpg(shell.console.pid, signal.SIGSTOP)
    try:
        before = int(where.run("cat", dropped))
        where.run(sys.executable, "-c", _FLOOD, tap, str(count))
        lost = int(where.run("cat", dropped)) - before
    finally:
        os.killpg(shell.console.pid, signal.SIGCONT)
    assert lost > 0
    return count - lost


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed")
def test_no_more_waits_for_a_guest_than_for_qemus() -> None:
    """During a flood, a ping to a guest waits behind no more frames than a ping to QEMU's guest.

    They are as many as the guest's ring, vhost-net and the tap's own queue hold.
    """
    with (
        network(2) as where,
        booted(where, "tap:tap0") as ours,
        qemus(where, "tap1") as theirs,
    ):
        mine, usual = waiting(where, ours, "tap0"), waiting(where, theirs, "tap1")
        print(f"frames that wait: {mine}, QEMU {usual}")
        assert mine < usual + 128  # buffers that the driver has not returned yet
        ours.power_off()
        theirs.console.send("poweroff -f\n")
        theirs.console.wait()


def test_without_messages() -> None:
    """Interrupts by the shared lines work on every data path, with another kernel, too.

    An interface without a cable has no carrier.
    """
    nics = [f"tap:tap{number}{option}" for number, option in enumerate(PATHS.values())]
    count = len(nics)
    with (
        network(count) as where,
        booted(where, *nics, "none", kernel="newer-generic", append="pci=nomsi") as shell,
    ):
        configure(shell, count)
        assert [answers(shell, number) for number in range(count)] == [True] * count
        shell.run(f"ip link set eth{count} up")
        shown = shell.run("cat /sys/class/net/eth*/carrier")
        assert shown.split() == [*["1"] * count, "0"]
        shell.power_off()


def test_tags_and_groups() -> None:
    """VLANs that the driver has asked for, and groups that the guest is in, on every data path."""
    kernel = artifacts.kernel("cloud")
    nics = [f"tap:tap{number}{option}" for number, option in enumerate(PATHS.values())]
    initrd = artifacts.initramfs_with(kernel, (*artifacts.NET_MODULES, "8021q"), "vlan")
    with network(len(nics)) as where, booted(where, *nics, initrd=initrd) as shell:
        configure(shell, len(nics))
        shell.run("echo 0 >/proc/sys/net/ipv4/icmp_echo_ignore_broadcasts")
        for number in range(len(nics)):
            tap, nic = f"tap{number}", f"eth{number}"
            assert abi.VIRTIO_NET_F_CTRL_VLAN in features(shell, number)
            for vlan in (5, 4094):
                near, far = f"10.{number}.{vlan % 256}.1", f"10.{number}.{vlan % 256}.2"
                kind = ("type", "vlan", "id", str(vlan))
                where.ip("link", "add", "link", tap, "name", f"{tap}.{vlan}", *kind)
                where.ip("addr", "add", f"{near}/24", "dev", f"{tap}.{vlan}")
                where.ip("link", "set", f"{tap}.{vlan}", "up")
                shell.run(f"vconfig add {nic} {vlan}")
                shell.run(f"ip addr add {far}/24 dev {nic}.{vlan}")
                shell.run(f"ip link set {nic}.{vlan} up")
                # Frames of full size, whose tag comes on top.
                assert ANSWERED in shell.run(f"ping -c 3 -i 0.2 -W 2 -s 1472 {near}")
            for group in ("224.0.0.1", "ff02::1", "ff02::1:ff00:2"):
                ping = where.run("busybox", "ping", "-c", "3", "-i", "0.2", "-I", tap, group)
                assert ANSWERED in ping, (nic, group)
            assert ANSWERED in shell.run(f"ping -c 3 -i 0.2 -W 2 -I {nic} ff02::1")
        shell.power_off()


_LEASE = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface && ip route add default via $router
"""


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_without_privileges(tmp_path: Path) -> None:
    """With passt there is an address by DHCP, a way out, and a way in if the client sends first.

    The passt of Debian 12 (2023-03-09) answers a guest's SYN-ACK only with the first data of the
    host's side, so a server that sends first does not learn of the connection.
    """
    with namespace("-passt") as where:
        where.ip("link", "add", "out0", "type", "veth", "peer", "name", "out1")
        where.ip("link", "set", "out0", "up")
        where.ip("link", "set", "out1", "up")
        where.ip("addr", "add", "192.0.2.10/24", "dev", "out0")
        where.ip("route", "add", "default", "via", "192.0.2.1")
        with booted(where, "passt,forward=tcp:8080:80") as shell:
            shell.run("ip link set eth0 up")
            lines = "".join(f"echo '{line}';" for line in _LEASE.splitlines())
            shell.run(f"({lines}) >/lease && chmod +x /lease")
            assert "192.0.2.10" in shell.run("udhcpc -i eth0 -n -q -s /lease 2>&1")
            with peer(where, "/proc/version", address="127.0.0.1"):
                # The guest has the host's own address; the router's address leads to the host.
                # A side that closes at once is not heard any more.
                shown = shell.run(f"sleep 5 | timeout 60 nc 192.0.2.1 {PORT}; true")
                assert shown == Path("/proc/version").read_text().strip()
            shell.run("mkdir /www; head -c 1000000 /dev/urandom >/www/data; httpd -h /www")
            received = tmp_path / "data"
            where.run("busybox", "wget", "-q", "-O", str(received), "http://127.0.0.1:8080/data")
            found = hashlib.md5(received.read_bytes()).hexdigest()
            assert found == shell.run("md5sum </www/data").split()[0]
            shell.power_off()
