"""`locked lladdr` with unmodified Debian kernels, in both directions, on each data path.

Each guest has two interfaces, one of which is locked. The host counts the guest's frames by its
ICMP, behind everything that could drop them; in the guest, a driver that takes every frame counts
the host's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest

from tests import artifacts
from tests.guest.daemon_guest import Shell, linux, without_vhost
from tests.guest.networks import guest, host, network
from tests.guest.test_net import booted
from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import Daemon
from tests.system.vmd.netns import Namespace
from tests.vmctl_driver import BOOT_TIMEOUT_S

pytestmark = [
    *(pytest.mark.guest, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)),
]

ANOTHER = "02:00:00:00:00:66"
"""An lladdr without an owner."""
COUNT = 20


class Passes(NamedTuple):
    """The kinds of frames that arrive."""

    from_its_own: bool
    from_another: bool
    to_its_own: bool
    to_another: bool


LOCKED = Passes(from_its_own=True, from_another=False, to_its_own=True, to_another=False)
OPEN = Passes(from_its_own=True, from_another=True, to_its_own=True, to_another=True)


class Run(Protocol):
    """Runs a command."""

    def __call__(self, *command: str) -> str:
        """Return its output."""


class Wire(NamedTuple):
    """A guest's interface and the host's end."""

    in_guest: Callable[[str], str]
    """Runs a command there, and returns its output, perhaps after the command itself."""
    on_host: Run
    nic: str
    link: str
    guest: str
    host: str

    def passes(self) -> Passes:
        """Try all four."""
        self.in_guest(f"ip link set {self.nic} promisc on")
        link = json.loads(self.on_host("ip", "-j", "link", "show", "dev", self.link))[0]
        self.in_guest(f"arp -s {self.host} {link['address']}")
        shown = self.in_guest(f"cat /sys/class/net/{self.nic}/address")
        mine = re.findall(r"\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b", shown)[-1]
        # The driver, without CTRL_MAC_ADDR, changes its own address; the device does not.
        to_its_own, to_another = self._sent_to(mine), self._sent_to(ANOTHER)
        from_its_own, from_another = self._sent_from(mine), self._sent_from(ANOTHER)
        self.in_guest(f"ip link set {self.nic} address {mine}")
        return Passes(from_its_own, from_another, to_its_own, to_another)

    def _sent_from(self, lladdr: str) -> bool:
        self.in_guest(f"ip link set {self.nic} address {lladdr}")
        before = self._echoes()
        self.in_guest(f"ping -c {COUNT} -i 0.02 -W 1 {self.host} >/dev/null; true")
        arrived = self._echoes() - before
        assert arrived in {0, COUNT}
        return arrived > 0

    def _echoes(self) -> int:
        names, values = (
            line.split()
            for line in self.on_host("cat", "/proc/net/snmp").splitlines()
            if line.startswith("Icmp:")
        )
        return int(values[names.index("InEchos")])

    def _sent_to(self, lladdr: str) -> bool:
        neighbour = (self.guest, "lladdr", lladdr, "dev", self.link, "nud", "permanent")
        self.on_host("ip", "neigh", "replace", *neighbour)
        before = self._received()
        ping = f"busybox ping -c {COUNT} -i 0.02 -W 1 {self.guest} >/dev/null; true"
        self.on_host("sh", "-c", ping)
        arrived = self._received() - before
        assert not COUNT // 2 < arrived < COUNT  # other frames may be among them
        return arrived >= COUNT

    def _received(self) -> int:
        shown = self.in_guest(f"cat /sys/class/net/{self.nic}/statistics/rx_packets")
        return int(re.findall(r"^\d+$", shown, re.MULTILINE)[-1])


@pytest.mark.parametrize("path", ["user", "process"])
def test_under_vmctl_run(path: str) -> None:
    """A locked interface passes no frame from or to another lladdr; an unlocked one does."""
    nics = (f"tap:tap0,{path},locked", f"tap:tap1,{path}")
    with network(2) as where, booted(where, *nics) as shell:
        shell.run("dmesg -n 1; echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6")
        found = []
        for number in range(2):
            nic = f"eth{number}"
            shell.run(f"ip addr add {guest(number)}/24 dev {nic} && ip link set {nic} up; sleep 1")
            wire = Wire(shell.run, where.run, nic, f"tap{number}", guest(number), host(number))
            found.append(wire.passes())
        assert found == [LOCKED, OPEN]
        shell.console.send("poweroff -f\n")
        assert shell.console.wait() == 0
        assert f"bad source address {ANOTHER}".encode() in shell.console.errors


@needs_separation
@pytest.mark.parametrize("path", ["vhost", "process"])
def test_under_vmd(path: str, tmp_path: Path, cloud_kernel: artifacts.Kernel) -> None:
    """So do interfaces on a switch, by the host's packet filter if the kernel moves frames."""
    if path == "vhost" and not Path("/dev/vhost-net").exists():
        pytest.skip("no /dev/vhost-net")
    switch = 'switch "{0}" {{\ncreate\naddress "10.0.{1}.1/24"\n}}\n'
    config = switch.format("br0", 0) + switch.format("br1", 1)
    config += linux(
        *("linux", cloud_kernel),
        'interface {\nswitch "br0"\nlocked lladdr\n}',
        'interface { switch "br1" }',
    )
    with ExitStack() as stack:
        space = stack.enter_context(Namespace())
        prefix = [*space.prefix, *(() if path == "vhost" else without_vhost(tmp_path))]
        vmd = stack.enter_context(Daemon(tmp_path, config, is_user=False, prefix=prefix))
        client = stack.enter_context(vmd.client(BOOT_TIMEOUT_S))
        client.wait_for_state("linux", "running")
        shell = Shell(stack.enter_context(client.console("linux")))
        shell.run("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6")
        found = []
        for number in range(2):
            nic, address = f"eth{number}", f"10.0.{number}.2"
            shell.run(f"ip addr add {address}/24 dev {nic}; ip link set {nic} up; sleep 1")
            wire = Wire(shell.run, space.run, nic, f"br{number}", address, f"10.0.{number}.1")
            found.append(wire.passes())
        assert found == [LOCKED, OPEN]
