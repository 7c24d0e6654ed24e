"""Networks of vmd with unmodified Debian kernels: addresses, the way out, and the way in."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests import artifacts, installed
from tests.debian import LOGIN, debian
from tests.guest.daemon_guest import Shell, linux
from tests.guest.linux_guest import COMMAND_LINE
from tests.guest.tools import UNPACK, missing, tools_disk
from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import Daemon, vm_block
from tests.system.vmd.netns import Namespace
from tests.vmctl_driver import BOOT_TIMEOUT_S

PROGRAMS = ("nft", "iperf3")

pytestmark = [
    *(pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(900)),
    needs_separation,
    pytest.mark.skipif(bool(missing(PROGRAMS)), reason=missing(PROGRAMS)),
]

WORLD, HOST = "192.0.2.2", "192.0.2.1"
WORLD6, HOST6 = "2001:db8::2", "2001:db8::1"
DATA = bytes(range(256)) * 4096

# udhcpc passes the answer to a script.
_CONFIGURE = (
    "printf '%s\\n' '#!/bin/busybox sh' '[ \"$1\" = bound ] || exit 0'"
    " 'ip addr add $ip/$mask dev eth0' 'ip route add $router dev eth0'"
    " 'ip route add default via $router' 'hostname $hostname' >/dhcp; chmod 755 /dhcp"
)


@pytest.fixture
def space() -> Iterator[Namespace]:
    """Make a namespace to run the daemon in."""
    with Namespace() as found:
        yield found


@pytest.fixture
def world(space: Namespace) -> Iterator[Namespace]:
    """Make another namespace beyond it, without a route to its guests."""
    with Namespace() as found:
        space.connect(found, f"{HOST}/24", f"{WORLD}/24")
        space.run("sysctl", "-q", "net.ipv6.conf.all.forwarding=1")
        for place, address in ((space, HOST6), (found, WORLD6)):
            (link,) = place.links() - {"lo"}
            place.run("ip", "addr", "add", f"{address}/64", "dev", link, "nodad")
        yield found


def _tcp_server(address: str, port: int) -> socket.socket:
    server = socket.create_server(
        (address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET
    )
    server.settimeout(BOOT_TIMEOUT_S)
    return server


def _digest(data: bytes) -> str:
    import hashlib  # noqa: PLC0415 - for this alone

    return hashlib.md5(data).hexdigest()


def test_a_local_interface(
    space: Namespace, world: Namespace, cloud_kernel: artifacts.Kernel, tmp_path: Path
) -> None:
    """A guest gets an address by DHCP, reaches host and world, and is reached by a host's port.

    By IPv4 and by IPv6, whose address the guest configures itself.
    """
    config = (
        "local prefix 100.64.0.0/10 nat\nlocal inet6 prefix fd12:3456:789a:bcde::/64\n"
        + linux(
            "linux",
            cloud_kernel,
            'local interface {\nforward tcp "*" 8080 to 80\nlocked lladdr fe:e1:bb:d1:00:01\n}',
        )
    )
    with ExitStack() as stack:
        vmd = stack.enter_context(Daemon(tmp_path, config, is_user=False, prefix=space.prefix))
        client = stack.enter_context(vmd.client(BOOT_TIMEOUT_S))
        client.wait_for_state("linux", "running")
        shell = Shell(stack.enter_context(client.console("linux")))
        shell.run(_CONFIGURE)
        shown = shell.run("udhcpc -i eth0 -n -q -t 10 -s /dhcp")
        assert "lease of 100.64.1.3 obtained from 100.64.1.2" in shown
        assert shell.run("hostname").splitlines()[-1] == "linux"
        assert " 0% packet loss" in shell.run("ping -c 3 100.64.1.2")
        assert " 0% packet loss" in shell.run(f"ping -c 3 {WORLD}")
        shell.run("for i in 1 2 3 4 5 6 7 8 9; do ip -6 route | grep -q default || sleep 1; done")
        assert "fd12:3456:789a:bcde:fce1:bbff:fed1:1/64" in shell.run("ip addr show eth0")
        assert " 0% packet loss" in shell.run("ping -c 3 fd12:3456:789a:bcde:6440:103:0:1")
        assert " 0% packet loss" in shell.run(f"ping -c 3 {WORLD6}")
        for address, peer in ((WORLD, HOST), (WORLD6, HOST6)):
            server = stack.enter_context(world.within(partial(_tcp_server, address, 7)))
            shell.run(f"(sleep 1; nc {address} 7 </dev/null | md5sum >/sum) & true")
            connection, seen = server.accept()
            with connection:
                assert seen[0] == peer
                connection.sendall(DATA)
            assert _digest(DATA) in shell.run("wait; cat /sum")
        for address in (HOST, HOST6):
            shell.run("(nc -l -p 80 </dev/null | md5sum >/sum) & true")
            shell.run("sleep 1")
            with world.within(partial(socket.create_connection, (address, 8080), 60)) as to:
                to.sendall(DATA)
            assert _digest(DATA) in shell.run("wait; cat /sum")
        assert client.ask("stop", name="linux", force=True, wait=True)["type"] == "terminated"
        space.wait_for_links({name for name in space.links() if not name.startswith("tap")})


def _digest_in(shown: str) -> str:
    (found,) = re.findall(r"\b[0-9a-f]{32}\b", shown)
    return str(found)


def _moved(shown: str) -> float:
    """Return the number of bytes that arrived, by iperf3's report."""
    report = json.loads(shown[shown.index("{") : shown.rindex("}") + 1])
    return float(report["end"]["sum_received"]["bytes"])


def _arp(link: str) -> socket.socket:
    """Return a socket that receives ARP packets."""
    heard = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    heard.bind((link, 0x0806))
    heard.settimeout(30)
    return heard


def _announces(frame: bytes, address: str) -> bool:
    """Tell whether the frame asks for its sender's own address. Source: RFC 5227 §2.3."""
    wanted = socket.inet_aton(address)
    return frame[28:32] == frame[38:42] == wanted


def test_two_guests_on_a_switch(
    space: Namespace, cloud_kernel: artifacts.Kernel, tmp_path: Path
) -> None:
    """They reach each other, the host and another machine, and their links follow the switch.

    Also by iperf3 and in whole frames of 9000 bytes. With a locked lladdr, they reach no machine
    from another address. A VM that was paused announces its address.
    """
    disk = f'disk "{tools_disk(tmp_path / "tools", "iperf3")}" {{ ro }}'
    own = 'interface {\nmtu 9000\nswitch "lan"\nqueues 2\n}'
    vms = linux("one", cloud_kernel, disk, own) + linux("two", cloud_kernel, disk, own)
    switch = 'switch "lan" {{\ncreate\naddress "10.0.0.1/24"\nlocked lladdr\n{}\n}}\n'
    config = switch.format("up") + vms
    with ExitStack() as stack:
        vmd = stack.enter_context(Daemon(tmp_path, config, is_user=False, prefix=space.prefix))
        client = stack.enter_context(vmd.client(BOOT_TIMEOUT_S))
        shells = []
        for number, name in enumerate(("one", "two"), 2):
            client.wait_for_state(name, "running")
            shell = Shell(stack.enter_context(client.console(name)))
            shell.run(f"ip addr add 10.0.0.{number}/24 dev eth0")
            shells.append(shell)
        one, two = shells
        machine = stack.enter_context(Namespace())
        space.connect(machine, "10.0.1.1/24", "10.0.0.9/24")
        space.run("ip", "link", "set", f"to{machine.pid}", "mtu", "9000", "master", "lan")
        machine.run("ip", "link", "set", f"to{space.pid}", "mtu", "9000")
        for address in ("10.0.0.1", "10.0.0.3", "10.0.0.9"):
            assert one.reaches(address)
            assert one.reaches(address, "-s", "8972")
        assert one.run("grep ^Ip: /proc/net/snmp").split()[-1] == "0"  # fragments
        two.run("mkdir /www; head -c 1000000 /dev/urandom >/www/data; httpd -h /www")
        one.run("wget -q -O /data http://10.0.0.3/data")
        assert _digest_in(one.run("md5sum </data")) == _digest_in(two.run("md5sum </www/data"))
        for shell in shells:
            shell.run(UNPACK)
        two.run("iperf3 -s -D")
        assert _moved(one.run("iperf3 -c 10.0.0.3 -t 2 -J")) > 1 << 20
        assert _moved(one.run("iperf3 -c 10.0.0.3 -t 2 -R -J")) > 1 << 20
        with subprocess.Popen([*space.prefix, "iperf3", "-s", "-B", "10.0.0.1"]) as server:
            assert _moved(one.run("sleep 1; iperf3 -c 10.0.0.1 -t 2 -J")) > 1 << 20
            server.terminate()
        with subprocess.Popen([*machine.prefix, "iperf3", "-s"]) as server:
            assert _moved(two.run("sleep 1; iperf3 -c 10.0.0.9 -t 2 -J")) > 1 << 20
            assert _moved(two.run("iperf3 -c 10.0.0.9 -t 2 -R -J")) > 1 << 20
            server.terminate()
        with machine.within(partial(_arp, f"to{space.pid}")) as heard:
            assert client.ask("pause", name="one")["type"] == "done"
            assert client.ask("unpause", name="one")["type"] == "done"
            while not _announces(heard.recv(64), "10.0.0.2"):
                pass
        for state, carrier in (("down", "0"), ("up", "1")):
            vmd.config.write_text(switch.format(state) + vms)
            assert client.ask("reload")["type"] == "done"
            shown = two.run("sleep 2; cat /sys/class/net/eth0/carrier")
            assert shown.splitlines()[-1] == carrier
        assert " 0% packet loss" in one.run("sleep 3; ping -c 3 10.0.0.3")
        one.run("ip link set eth0 address fe:e1:bb:d1:00:99; ip neigh flush dev eth0")
        assert " 100% packet loss" in one.run("ping -c 2 -W 1 10.0.0.3")


def test_an_rdomain(
    space: Namespace, world: Namespace, cloud_kernel: artifacts.Kernel, tmp_path: Path
) -> None:
    """An interface in a routing domain reaches the host in it and nothing else; another one does.

    The rig's kernel has VRFs; without them the interface would be down.
    """
    assert world.links()
    config = "local prefix 100.64.0.0/10 nat\n" + linux(
        "linux", cloud_kernel, "local interface { rdomain 5 }", "local interface"
    )
    inside, outside = "100.64.1.3", "100.64.1.5"
    with ExitStack() as stack:
        vmd = stack.enter_context(Daemon(tmp_path, config, is_user=False, prefix=space.prefix))
        client = stack.enter_context(vmd.client(BOOT_TIMEOUT_S))
        client.wait_for_state("linux", "running")
        if "rdomain5" not in space.links():
            pytest.skip("this kernel has no VRFs")
        assert "unreachable default" in space.run("ip", "route", "show", "table", "all")
        shell = Shell(stack.enter_context(client.console("linux")))
        for name, address in (("eth0", inside), ("eth1", outside)):
            shell.run(f"ip addr add {address}/31 dev {name}; ip link set {name} up")

        def reaches(target: str, *options: str) -> bool:
            shown = space.run(
                "sh", "-c", " ".join(["busybox ping -c 2 -W 2", *options, target, "; true"])
            )
            return " 0% packet loss" in shown

        assert reaches(outside)
        assert not reaches(inside)
        assert reaches(inside, "-I", "rdomain5")
        assert not reaches(outside, "-I", "rdomain5")
        assert " 0% packet loss" in shell.run("ping -c 2 100.64.1.2")
        for router, answers in (("100.64.1.2", False), ("100.64.1.4", True)):
            shown = shell.run(f"ip route add default via {router}; ping -c 2 -W 2 {WORLD}")
            assert (" 0% packet loss" in shown) is answers, shown
            shell.run("ip route del default")
    for family in ("-4", "-6"):
        assert "unreachable default" not in space.run("ip", family, "route", "show", "table", "all")


def test_systemd_networkd(space: Namespace, tmp_path: Path) -> None:
    """An installed Debian gets address, router and name server by systemd's own DHCP client."""
    system, image = debian(), tmp_path / "disk.qcow2"
    installed.create("-i", system.disk, image)
    config = vm_block(
        "networkd",
        f'disk "{image}"',
        f'initrd "{system.initrd}"',
        f'append "root=/dev/vda3 rw {COMMAND_LINE}"',
        "local interface { lladdr fe:e1:bb:d1:00:01 }",
        boot=system.vmlinuz,
        memory="384M",
        enabled=True,
    )
    with ExitStack() as stack:
        vmd = stack.enter_context(Daemon(tmp_path, config, is_user=False, prefix=space.prefix))
        client = stack.enter_context(vmd.client(installed.LOGIN_S))
        client.wait_for_state("networkd", "running")
        console = stack.enter_context(client.console("networkd"))
        console.expect(LOGIN.encode())
        console.type(b"root\n")
        console.expect(b"debian:~# ")
        console.type(
            b"printf '[Match]\\nName=e*\\n[Network]\\nDHCP=ipv4\\n'"
            b" >/etc/systemd/network/e.network;"
            b" systemctl start systemd-networkd;"
            b" /lib/systemd/systemd-networkd-wait-online --timeout=60;"
            b" cat /run/systemd/netif/leases/* /proc/net/route; echo end''ed\n"
        )
        console.expect(b"ended")
        lines = console.output.decode(errors="replace").split()
        told = {"ADDRESS=100.64.1.3", "ROUTER=100.64.1.2", "DNS=100.64.1.2", "HOSTNAME=networkd"}
        assert told <= set(lines), lines
        assert "02014064" in lines  # the default route, as the kernel writes it
        pinged = space.run("busybox", "ping", "-c", "3", "100.64.1.3")
        assert " 0% packet loss" in pinged
        assert client.ask("stop", name="networkd", force=True, wait=True)["type"] == "terminated"
