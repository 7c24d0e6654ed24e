"""Networks of a real daemon, in network namespaces: interfaces, traffic, leftovers."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.dns import DNS, DNSQR, DNSRR
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6ND_RA, ICMPv6ND_RS, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from tests.system.vmd.daemon import (
    READY,
    SELFTEST,
    Answer,
    Client,
    Daemon,
    descendants,
    process_title,
    vm_block,
)
from tests.system.vmd.netns import Namespace, TapGuest, udp_server

pytestmark = [pytest.mark.kvm, pytest.mark.root]

GUEST = "fe:e1:bb:d1:00:01"
HOST = "fe:e1:bb:d1:00:02"
LOCKED = "locked lladdr"
_XID = 0x5EED0000
_ASKED = 90
BRIDGE = "52:54:00:00:00:07"
GUEST_ADDRESS, HOST_ADDRESS = "100.64.1.3", "100.64.1.2"


class Start(Protocol):
    """Starts a daemon."""

    def __call__(self, config: str, *, prefix: tuple[str, ...] = ()) -> Daemon:
        """Start one in the test's namespace, with the text of a vm.conf."""


def local_vm(*options: str, name: str = "web", enabled: bool = True) -> str:
    """Return a VM with one local interface."""
    lladdr = f"lladdr {GUEST}"
    if LOCKED in options:
        options, lladdr = tuple(each for each in options if each != LOCKED), f"{LOCKED} {GUEST}"
    lines = "\n".join(("local interface {", lladdr, *options, "}"))
    return vm_block(name, lines, enabled=enabled)


@pytest.fixture
def space(networks: None) -> Iterator[Namespace]:  # noqa: ARG001 - skips
    """Make a namespace for a daemon."""
    with Namespace() as found:
        yield found


@pytest.fixture
def world(space: Namespace) -> Iterator[Namespace]:
    """Make another namespace, 192.0.2.2, which has a route to 192.0.2.1, the daemon's, alone."""
    with Namespace() as found:
        space.connect(found, "192.0.2.1/24", "192.0.2.2/24")
        yield found


@pytest.fixture
def start(space: Namespace, tmp_path: Path) -> Start:
    """Return a function that starts a daemon there."""

    def started(config: str, *, prefix: tuple[str, ...] = ()) -> Daemon:
        words = [*space.prefix, *prefix]
        return Daemon(tmp_path, config, is_user=False, prefix=words)

    return started


def guest_of(vmd: Daemon, tap: str = "tap0", address: str = GUEST_ADDRESS) -> TapGuest:
    """Return the guest behind a tap of the daemon's."""
    return TapGuest(vmd.process.pid, tap, GUEST, address)


def running(client: Client, *names: str) -> None:
    """Wait until VMs run."""
    for name in names:
        client.wait_for_state(name, "running")


def kill(vmd: Daemon) -> None:
    """Kill a daemon, which cannot tidy up."""
    vmd.process.kill()
    vmd.process.wait()


# Interfaces


def test_interfaces_of_a_vm(space: Namespace, start: Start) -> None:
    """Each interface has its tap, on its bridge: name, description, group, MTU as in vm.conf."""
    space.run("ip", "link", "add", "br7", "address", BRIDGE, "type", "bridge")
    before = space.links()
    config = (
        'switch "uplink" { interface br7 }\n'
        + vm_block("web", "local interface", 'interface tap9 { mtu 9000\nswitch "uplink"\n}')
        + vm_block("other", "interface { down }", 'interface { switch "none" }')
    )
    with start(config) as vmd, vmd.client() as client:
        assert client.ask("start", name="web")["type"] == "started"
        assert client.ask("start", name="other")["type"] == "started"
        shown = {name: space.run("ip", "-d", "addr", "show", name) for name in space.links()}
        assert shown.keys() == before | {"tap0", "tap1", "tap2", "tap9"}
        assert "alias vm1-if0-web" in shown["tap0"]
        assert "inet 100.64.1.2/31" in shown["tap0"]
        assert "alias vm1-if1-web" in shown["tap9"]
        assert "master br7" in shown["tap9"]
        assert "mtu 9000" in shown["tap9"]
        assert "inet" not in shown["tap9"]
        assert "UP" in shown["br7"]
        assert "UP" not in shown["tap1"]
        vmd.wait_for_log('vm/other: switch "none" not found')
        assert client.ask("stop", name="web", force=True, wait=True)["type"] == "terminated"
        space.wait_for_links(before | {"tap1", "tap2"})
        assert vmd.stop() == 0
        assert space.links() == before


def test_a_switch_of_our_own(space: Namespace, start: Start) -> None:
    """A switch's bridge is made with its address, and goes with the daemon; foreign ones stay."""
    space.run("ip", "link", "add", "br7", "address", BRIDGE, "type", "bridge")
    before = space.state()
    config = (
        'switch "own" {\ncreate\naddress "10.0.0.1/24"\n}\n'
        'switch "theirs" {\ninterface br7\ndown\n}\n'
        + vm_block("web", 'interface { switch "own" }', enabled=True)
    )
    with start(config) as vmd, vmd.client() as client:
        running(client, "web")
        assert "inet 10.0.0.1/24" in space.run("ip", "addr", "show", "own")
        assert "master own" in space.run("ip", "link", "show", "tap0")
        assert vmd.stop() == 0
    assert space.state() == before


def test_reset_and_reload_of_switches(space: Namespace, start: Start) -> None:
    """A reload removes switches that the configuration no longer has, and makes new ones."""
    before = space.links()
    vm = vm_block("web", 'interface { switch "two" }')
    config = 'switch "one" { create }\nswitch "two" { create }\n' + vm
    with start(config) as vmd, vmd.client() as client:
        space.wait_for_links(before | {"one", "two"})
        assert client.ask("start", name="web")["type"] == "started"
        vmd.config.write_text('switch "two" { create }\nswitch "three" { create }\n' + vm)
        assert client.ask("reload")["type"] == "done"
        space.wait_for_links(before | {"two", "three", "tap0"})
        assert client.ask("reset", mode="switches")["type"] == "done"
        space.wait_for_links(before | {"tap0"})
        assert client.ask("reload")["type"] == "done"
        space.wait_for_links(before | {"two", "three", "tap0"})
        _eventually(lambda: "master two" in space.run("ip", "link", "show", "tap0"))


def test_up_and_down(space: Namespace, start: Start) -> None:
    """A reload brings taps of running VMs up and down, and the links of those on a down switch.

    Both ends have the same queues, as many as vm.conf says.
    """

    def config(switch: str, interface: str) -> str:
        own = f'interface {{ switch "own"\nqueues 3\n{interface} }}'
        return f'switch "own" {{\ncreate\n{switch}\n}}\n' + vm_block("web", own, "local interface")

    def links(client: Client) -> list[bool]:
        vms = client.ask("status", name="web", interfaces=True)["vms"]
        assert isinstance(vms, list)
        return [one["is_up"] for one in vms[0]["interfaces"]]

    def is_up(name: str, *, is_so: bool = True) -> bool:
        return (",UP" in space.run("ip", "link", "show", name)) is is_so

    with start(config("up", "down")) as vmd, vmd.client() as client:
        assert client.ask("start", name="web")["type"] == "started"
        assert "numqueues 3" in space.run("ip", "-d", "link", "show", "tap0")
        for switch, interface, expected in (
            *(("up", "down", False), ("up", "up", True), ("down", "up", False)),
            *(("down", "down", False), ("up", "up", True)),
        ):
            vmd.config.write_text(config(switch, interface))
            assert client.ask("reload")["type"] == "done"
            _eventually(partial(is_up, "tap0", is_so=interface == "up"))
            assert links(client) == [expected, True]
            assert is_up("tap1")
        vmd.wait_for_log("started web")


def test_start_with_interfaces(space: Namespace, start: Start) -> None:
    """`vmctl start -L -n lan -i 3` makes interfaces: local, on a switch, and without link."""
    kernel = os.open(SELFTEST, os.O_RDONLY)
    with start('switch "lan" { create }\n') as vmd, vmd.client() as client:
        wanted = [{"is_local": True}, {"switch": "lan"}, {}]
        try:
            answer = client.ask("start", (kernel,), name="x", kernel=0, interfaces=wanted)
        finally:
            os.close(kernel)
        assert answer["type"] == "started"
        assert space.links() == {"lo", "lan", "tap0", "tap1", "tap2"}
        assert f"inet {HOST_ADDRESS}/31" in space.run("ip", "addr", "show", "tap0")
        assert "master lan" in space.run("ip", "link", "show", "tap1")
        assert "master" not in space.run("ip", "link", "show", "tap2")


def test_thirty_at_once(space: Namespace, start: Start) -> None:
    """Thirty VMs that start together all have their interfaces, and leave none."""
    names = [f"vm{number}" for number in range(30)]
    interfaces = ("local interface { locked lladdr }", 'interface { switch "lan" }')
    config = 'local prefix 100.64.0.0/10 nat\nswitch "lan" { create }\n'
    config += "".join(vm_block(name, *interfaces) for name in names)
    with start(config) as vmd, ExitStack() as stack:
        clients = [stack.enter_context(vmd.client()) for _ in names]
        for client, name in zip(clients, names, strict=True):
            client.send("start", name=name)
        assert [client.receive()[0]["type"] for client in clients] == ["started"] * 30
        assert len(space.links()) == 2 + 60
        assert space.rules().count("hook egress") == 30
        assert len(re.findall("inet 100.64", space.run("ip", "addr"))) == 30
        for client, name in zip(clients, names, strict=True):
            client.send("stop", name=name, force=True, wait=True)
        for client in clients:
            client.receive()
        space.wait_for_links({"lo", "lan"})
        assert "netdev" not in space.rules()


@pytest.mark.parametrize("victims", [["vmd"], ["vmd", "vmd: priv"]], ids=" and ".join)
def test_nothing_is_left_of_a_daemon_that_was_killed(
    space: Namespace, start: Start, victims: list[str]
) -> None:
    """After a kill of the daemon priv cleans up; the next daemon does if priv has died too."""
    before = space.state()
    config = (
        'local prefix 100.64.0.0/10 nat\nswitch "own" { create }\n'
        + local_vm(LOCKED)
        + vm_block("two", 'interface { switch "own" }', enabled=True)
    )
    vmd = start(config)
    with vmd.client() as client:
        running(client, "web", "two")
    assert {"tap0", "tap1", "own"} < space.links()
    priv = vmd.child("vmd: priv")
    if len(victims) > 1:
        os.kill(priv, signal.SIGSTOP)  # it must not notice the end
    kill(vmd)
    if len(victims) > 1:
        os.kill(priv, signal.SIGKILL)
        space.wait_for_links({"lo", "own"})
        with start("") as again, again.client() as client:
            client.ask("status")
            space.wait_for_links({"lo"})
    space.wait_for_links({"lo"})
    _eventually(lambda: space.state() == before)


def test_a_bridge_that_was_about_to_be_marked(space: Namespace, start: Start) -> None:
    """If priv is killed between making a bridge and describing it, no bridge is left."""
    vmd = start('switch "own" { create }\n')
    space.wait_for_links({"lo", "own"})
    _eventually(lambda: "alias vmd" in space.run("ip", "link", "show", "own"))
    os.kill(priv := vmd.child("vmd: priv"), signal.SIGSTOP)
    kill(vmd)
    os.kill(priv, signal.SIGKILL)
    space.run("ip", "link", "set", "own", "alias", "")
    with start('switch "own" { create }\n') as again:
        _eventually(lambda: "alias vmd" in space.run("ip", "link", "show", "own"))
        assert again.stop() == 0
    assert space.links() == {"lo"}


def _eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_reboot_keeps_the_interface(space: Namespace, start: Start) -> None:
    """After a reboot the guest has the same tap."""
    with start(local_vm()) as vmd, vmd.client() as client:
        pid = client.wait_for_state("web", "running")["pid"]
        before = space.run("ip", "-o", "link", "show", "tap0").split(":")[0]
        with client.console("web") as console:
            console.expect(READY)
            console.type(b"r")
            console.read_to_end()
        _eventually(lambda: client.vm("web")["pid"] not in {pid, None})
        assert space.run("ip", "-o", "link", "show", "tap0").split(":")[0] == before


def test_what_cannot_be_had(space: Namespace, start: Start) -> None:
    """A missing bridge is shown until it is there; a tap in use keeps the VM from starting."""
    config = (
        'switch "gone" { interface br7 }\n'
        + vm_block("one", 'interface tap5 { switch "gone" }', enabled=True)
        + vm_block("two", "interface tap5")
    )
    with start(config) as vmd, vmd.client() as client:
        vmd.wait_for_log('switch "gone": bridge "br7" does not exist')
        running(client, "one")
        vmd.wait_for_log('vm/one: interface 0: bridge "br7" does not exist')
        assert _problem(client, "one") == 'bridge "br7" does not exist'
        space.run("ip", "link", "add", "br7", "type", "bridge")
        vmd.process.send_signal(signal.SIGHUP)
        _eventually(lambda: _problem(client, "one") == "")
        assert "master br7" in space.run("ip", "link", "show", "tap5")
        answer = client.ask("start", name="two")
        assert (answer["type"], answer["message"]) == ("failed", "tap5: Device or resource busy")
        assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
        assert client.ask("start", name="two")["type"] == "started"
        assert space.links() == {"lo", "br7", "tap5"}


def _problem(client: Client, name: str) -> object:
    vms = client.ask("status", name=name, interfaces=True)["vms"]
    assert isinstance(vms, list)
    return vms[0]["interfaces"][0].get("problem", "")


_WITHOUT = {
    "nftables": (
        'mount --bind /dev/null "$(readlink -f /usr/lib/*/libnftables.so.1)"',
        "no nftables: no NAT, no forwarded ports",
        {"lo", "tap0"},
    ),
    "taps": (
        "mount -t tmpfs tmpfs /dev/net",
        "vm/web: started without its interfaces: /dev/net/tun is missing",
        {"lo"},
    ),
}


@pytest.mark.parametrize("missing", list(_WITHOUT))
def test_a_host_that_lacks_something(space: Namespace, start: Start, missing: str) -> None:
    """One line names a feature that the host lacks; VMs run without it, and locks still hold."""
    hide, line, links = _WITHOUT[missing]
    prefix = ("unshare", "--mount", "sh", "-c", f'{hide} && exec "$@"', "sh")
    config = "local prefix 100.64.0.0/10 nat\n" + local_vm(LOCKED, 'forward tcp "*" 8080 to 80')
    with start(config, prefix=prefix) as vmd, vmd.client() as client:
        running(client, "web")
        vmd.wait_for_log(line)
        assert vmd.log.read_text().count(line) == 1
        assert space.links() == links
        # If no rule can lock the address, a process of ours does it instead of vhost-net.
        movers = [pid for pid in descendants(vmd.process.pid) if process_title(pid) == "nic/web"]
        assert len(movers) == (missing == "nftables")
        assert vmd.stop() == 0


def test_an_address_beyond_the_prefix(start: Start) -> None:
    """A VM whose id does not fit into the local prefix does not start."""
    config = "local prefix 10.0.0.0/16\n" + "".join(
        local_vm(name=f"vm{number}", enabled=False) for number in range(1, 258)
    )
    with start(config) as vmd, vmd.client() as client:
        answer = client.ask("start", name="vm256")
        expected = "dhcp address range exceeded, vm id 256 interface 0"
        assert (answer["type"], answer["message"]) == ("failed", expected)


def test_one_port_leads_to_one_guest(start: Start) -> None:
    """A forward that another VM has keeps a VM from starting until that VM is gone."""
    forward = "forward tcp 8080 to 80"
    config = local_vm(forward, name="one") + local_vm(forward, name="two", enabled=False)
    with start(config) as vmd, vmd.client() as client:
        running(client, "one")
        answer = client.ask("start", name="two")
        expected = 'forward tcp 8080: vm "one" has it'
        assert (answer["code"], answer["message"]) == ("EBUSY", expected)
        assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
        assert client.ask("start", name="two")["type"] == "started"


def _told(answer: Answer) -> tuple[dict[str, object], dict[str, object]]:
    """Return the only interface in an answer, and the statistics of its VM."""
    assert isinstance(answer["vms"], list)
    (vm,) = answer["vms"]
    (interface,) = vm["interfaces"]
    assert isinstance(interface, dict)
    assert isinstance(vm["statistics"], dict)
    return interface, vm["statistics"]


def test_what_is_told_of_interfaces(start: Start) -> None:
    """A status with interfaces has their addresses; their traffic counts for the VM as well."""
    with start(local_vm('forward tcp "*" 80 to 8080')) as vmd, vmd.client() as client:
        running(client, "web")
        with guest_of(vmd) as guest:
            guest.find(HOST_ADDRESS)
        client.send("status", name="web", interfaces=True, statistics=True)
        interface, statistics = _told(client.receive()[0])
        assert (interface["tap"], interface["lladdr"]) == ("tap0", GUEST)
        assert interface["host_addresses"] == [f"{HOST_ADDRESS}/31"]
        assert interface["guest_addresses"] == [f"{GUEST_ADDRESS}/31"]
        told = {"protocol": "tcp", "port": 80, "to_port": 8080, "address": ""}
        assert interface["forwards"] == [told]
        assert interface["sent_packets"]
        assert interface["received_packets"]
        counted = statistics["net_received"], statistics["net_sent"]
        assert counted == (interface["received"], interface["sent"])
        assert client.vm("web")["interfaces"] == []


def test_what_a_switch_says_of_its_interfaces(start: Start) -> None:
    """A switch's interfaces are locked and in its rdomain, even of VMs defined before it."""
    switch = 'switch "later" {\ncreate\nlocked lladdr\nrdomain 5\n}\n'
    plain = 'interface { switch "later" }'
    own = 'interface {\nswitch "later"\nrdomain 7\n}'
    with start(vm_block("web", plain, own) + switch) as vmd, vmd.client() as client:
        assert client.ask("start", name="web")["type"] == "started"
        vms = client.ask("status", name="web", interfaces=True)["vms"]
        assert isinstance(vms, list)
        told = [(each["is_locked"], each["rdomain"]) for each in vms[0]["interfaces"]]
        assert told == [(True, 5), (True, 7)]


def test_what_a_file_says_no_longer_counts_no_longer(start: Start) -> None:
    """After a reload without local prefixes, the next start has addresses of the default one."""

    def addresses(client: Client) -> list[str]:
        assert client.ask("start", name="web")["type"] == "started"
        vms = client.ask("status", name="web", interfaces=True)["vms"]
        assert isinstance(vms, list)
        found: list[str] = vms[0]["interfaces"][0]["guest_addresses"]
        assert client.ask("stop", name="web", force=True, wait=True)["type"] == "terminated"
        return found

    web = local_vm(enabled=False)
    said = "local prefix 10.9.0.0/16\nlocal inet6 prefix fd09::/64\n"
    with start(said + web) as vmd, vmd.client() as client:
        assert addresses(client) == ["10.9.1.3/31", "fd09::fce1:bbff:fed1:1/64"]
        vmd.config.write_text(web)
        assert client.ask("reload")["type"] == "done"
        assert addresses(client) == [f"{GUEST_ADDRESS}/31"]


def test_rdomains(space: Namespace, start: Start) -> None:
    """An interface is in the VRF of its rdomain, or stays down if the kernel has none."""
    with start(local_vm("rdomain 5")) as vmd, vmd.client() as client:
        running(client, "web")
        shown = space.run("ip", "link", "show", "tap0")
        if "rdomain5" in space.links():
            assert "master rdomain5" in shown
            assert client.ask("stop", name="web", force=True, wait=True)["type"] == "terminated"
            space.wait_for_links({"lo"})
        else:
            vmd.wait_for_log("rdomain5: ")
            assert ",UP" not in shown


# Traffic


def _options(packet: Packet) -> dict[str, object]:
    return {each[0]: each[1] for each in packet[DHCP].options if isinstance(each, tuple)}


def _request(guest: TapGuest, kind: str, *, port: int = 67, xid: int = 7) -> Packet:
    return (
        Ether(src=guest.lladdr, dst="ff:ff:ff:ff:ff:ff")
        / IP(src="0.0.0.0", dst="255.255.255.255")
        / UDP(sport=68, dport=port)
        / BOOTP(chaddr=bytes.fromhex(guest.lladdr.replace(":", "")), xid=xid, flags="B")
        / DHCP(options=[("message-type", kind), ("requested_addr", guest.address), "end"])
    )


def _dhcp(guest: TapGuest, kind: str) -> Packet:
    request = _request(guest, kind)
    return guest.ask(request, lambda frame: BOOTP in frame and frame[BOOTP].op == 2)


def test_dhcp(start: Start) -> None:
    """DHCP gives a guest address, router and name, also from a server that has crashed before."""
    with start(local_vm(LOCKED)) as vmd, vmd.client() as client:
        running(client, "web")
        with guest_of(vmd) as guest:
            offer = _dhcp(guest, "discover")
            assert (offer.src, offer[BOOTP].yiaddr) == (HOST, GUEST_ADDRESS)
            acknowledged = _options(_dhcp(guest, "request"))
            assert acknowledged["message-type"] == 5
            assert acknowledged["router"] == acknowledged["name_server"] == HOST_ADDRESS
            assert acknowledged["hostname"] == b"web"
            os.kill(vmd.child("vmd: local"), signal.SIGKILL)
            vmd.wait_for_log("lost child: local")
            assert _options(_dhcp(guest, "request"))["message-type"] == 5


def test_a_flood_delays_no_other_guest(start: Start) -> None:
    """A guest's flood of DHCP delays another's answer no more than a flood of nonsense.

    Both floods cost the host the same; only DHCP frames reach a process of ours.
    """
    other = "local interface {\nlladdr fe:e1:bb:d2:00:01\n}"
    with start(local_vm() + vm_block("two", other, enabled=True)) as vmd:
        with vmd.client() as client:
            running(client, "web", "two")
        pid = vmd.process.pid
        with (
            guest_of(vmd) as guest,
            TapGuest(pid, "tap1", "fe:e1:bb:d2:00:01", "100.64.2.3") as two,
        ):
            questions = [
                (two.frame(_request(two, "request", xid=number)), number.to_bytes(4, "big"))
                for number in range(_XID, _XID + _ASKED)
            ]
            took = {}
            for port in (9, 67):
                with guest.flooding(guest.frame(_request(guest, "request", port=port))):
                    times = sorted(two.time_to_answer(*question) for question in questions)
                took[port] = times[_ASKED // 2]
        assert took[67] < 2 * took[9], took


def test_a_flood_is_passed_over(start: Start) -> None:
    """A guest that floods with requests is answered again later."""
    with start(local_vm()) as vmd:
        with vmd.client() as client:
            running(client, "web")
        with guest_of(vmd) as guest:
            frame = Ether(src=GUEST, dst="33:33:00:00:00:02") / IP(src="0.0.0.0") / UDP(dport=67)
            data = guest.frame(frame / Raw(bytes(300)))
            for _ in range(5000):
                guest.write(data)
            assert _options(_dhcp(guest, "request"))["message-type"] == 5


def test_nat(world: Namespace, start: Start) -> None:
    """With nat the world sees the host's address, and its answers reach the guest.

    The world has no route to the guest.
    """
    server = world.within(lambda: udp_server("192.0.2.2", 7))
    with server, start("local prefix 100.64.0.0/10 nat\n" + local_vm()) as vmd:
        with vmd.client() as client:
            running(client, "web")
        with guest_of(vmd) as guest:
            router = guest.find(HOST_ADDRESS)
            assert router == HOST
            guest.send(guest.to(router, "192.0.2.2") / UDP(sport=1234, dport=7) / Raw(b"question"))
            data, peer = server.recvfrom(100)
            assert (data, peer[0]) == (b"question", "192.0.2.1")
            server.sendto(b"answer", peer)
            reply = guest.receive(lambda frame: UDP in frame)
            assert reply is not None
            assert (reply[IP].src, reply[UDP].dport) == ("192.0.2.2", 1234)
            assert bytes(reply[UDP].payload) == b"answer"
        assert vmd.stop() == 0


@pytest.mark.parametrize("origin", ["world", "host"])
def test_forwarded_ports(space: Namespace, world: Namespace, start: Start, origin: str) -> None:
    """A port of the host's address leads to the guest's; from the host itself too."""
    config = "local prefix 100.64.0.0/10 nat\n" + local_vm('forward udp "*" 8053 to 53')
    with start(config) as vmd, vmd.client() as client:
        running(client, "web")
        place = world if origin == "world" else space
        sender = place.within(lambda: udp_server("0.0.0.0", 999))
        with guest_of(vmd) as guest, sender:
            guest.find(HOST_ADDRESS)
            sender.sendto(b"question", ("192.0.2.1", 8053))
            found = guest.receive(lambda frame: UDP in frame)
            assert found is not None
            assert (found[UDP].dport, bytes(found[UDP].payload)) == (53, b"question")
            back = guest.to(found.src, found[IP].src) / UDP(sport=53, dport=found[UDP].sport)
            guest.send(back / Raw(b"answer"))
            data, peer = sender.recvfrom(100)
            assert (data, peer) == (b"answer", ("192.0.2.1", 8053))


@pytest.mark.parametrize("address", ["", "127.0.0.1", "*", "0.0.0.0"])
def test_forwards_from_the_loopback(
    space: Namespace, world: Namespace, start: Start, address: str
) -> None:
    """A forward from 127.0.0.1 leads to the guest, and gives the guest no access.

    From outside, a port of that address alone, which is the default, is unreachable.
    """
    quoted = f'"{address}" ' if address else ""
    config = "local prefix 100.64.0.0/10\n" + local_vm(f"forward udp {quoted}8053 to 53")
    with start(config) as vmd, vmd.client() as client:
        running(client, "web")
        inner = space.within(lambda: udp_server("0.0.0.0", 999))
        outer = world.within(lambda: udp_server("0.0.0.0", 999))
        own = space.within(lambda: udp_server("127.0.0.1", 998))
        with guest_of(vmd) as guest, inner, outer, own:
            guest.find(HOST_ADDRESS)
            inner.sendto(b"question", ("127.0.0.1", 8053))
            found = guest.receive(lambda frame: UDP in frame)
            assert found is not None
            assert (found[IP].src, found[UDP].dport) == (HOST_ADDRESS, 53)
            back = guest.to(found.src, found[IP].src) / UDP(sport=53, dport=found[UDP].sport)
            guest.send(back / Raw(b"answer"))
            assert inner.recvfrom(100) == (b"answer", ("127.0.0.1", 8053))
            guest.send(guest.to(found.src, "127.0.0.1") / UDP(sport=53, dport=998) / Raw(b"in"))
            own.settimeout(0.5)
            with pytest.raises(TimeoutError):
                own.recvfrom(100)
            outer.sendto(b"from outside", ("192.0.2.1", 8053))
            is_for_all = address in {"*", "0.0.0.0"}
            reached = guest.receive(lambda frame: UDP in frame, 2 if is_for_all else 0.5)
            assert (reached is not None) == is_for_all


def test_locked_lladdr(space: Namespace, start: Start) -> None:
    """A locked interface drops frames from and to another address; others and broadcasts pass."""
    with start(local_vm(LOCKED)) as vmd, vmd.client() as client:
        running(client, "web")
        ping = IP(src=GUEST_ADDRESS, dst=HOST_ADDRESS) / ICMP()
        with guest_of(vmd) as guest:
            guest.find(HOST_ADDRESS)
            reply = guest.ask(Ether(src=GUEST, dst=HOST) / ping, lambda frame: ICMP in frame)
            assert reply.dst == GUEST
            guest.send(Ether(src="fe:e1:bb:d1:00:09", dst=HOST) / ping)
            assert guest.receive(lambda frame: ICMP in frame, 0.5) is None
            # The host sends to a wrong address if a neighbour entry says so.
            wrong = ("lladdr", "fe:e1:bb:d1:00:09", "dev", "tap0")
            space.run("ip", "neigh", "replace", GUEST_ADDRESS, *wrong)
            server = space.within(lambda: udp_server(HOST_ADDRESS, 999))
            with server:
                server.sendto(b"to another", (GUEST_ADDRESS, 1))
                assert guest.receive(lambda frame: UDP in frame, 0.5) is None
                right = ("lladdr", GUEST, "dev", "tap0")
                space.run("ip", "neigh", "replace", GUEST_ADDRESS, *right)
                server.sendto(b"to it", (GUEST_ADDRESS, 1))
                assert guest.receive(lambda frame: UDP in frame) is not None


def test_the_host_heeds_no_router_behind_a_tap(space: Namespace, start: Start) -> None:
    """A router advertisement of a guest changes nothing on the host."""
    config = "local inet6 prefix fd12:3456:789a:bcde::/64\n" + local_vm()
    with start(config) as vmd, vmd.client() as client:
        running(client, "web")
        before = space.run("ip", "-6", "route")
        with guest_of(vmd) as guest:
            fake = IPv6(src="fe80::1", dst="ff02::1", hlim=255) / ICMPv6ND_RA(routerlifetime=1800)
            guest.send(Ether(src=GUEST, dst="33:33:00:00:00:01") / fake)
            guest.find(HOST_ADDRESS)
        assert space.run("ip", "-6", "route") == before


def test_ipv6(space: Namespace, start: Start) -> None:
    """The host sends router advertisements; the address that the guest derives is reachable."""
    config = "local inet6 prefix fd12:3456:789a:bcde::/64\n" + local_vm()
    with start(config) as vmd, vmd.client() as client:
        running(client, "web")
        assert "fd12:3456:789a:bcde:6440:103:0:1/96" in space.run("ip", "addr", "show", "tap0")
        with guest_of(vmd) as guest:
            question = Ether(src=GUEST, dst="33:33:00:00:00:02") / IPv6(
                src="::", dst="ff02::2", hlim=255
            )
            told = guest.ask(question / ICMPv6ND_RS(), lambda frame: ICMPv6ND_RA in frame)
            assert (told.src, told[IPv6].src) == (HOST, "fe80::fce1:bbff:fed1:2")
        route = space.run("ip", "-6", "route", "get", "fd12:3456:789a:bcde:fce1:bbff:fed1:1")
        assert "dev tap0" in route


def test_dns(space: Namespace, start: Start, tmp_path: Path) -> None:
    """DNS questions to the host's address there go to the host's server, and answers come back."""
    own = tmp_path / "resolv.conf"
    own.write_text("# ours\nsearch example\nnameserver 127.0.0.9\n")
    replaced = f'mount --bind {own} /etc/resolv.conf && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", replaced, "sh")
    server = space.within(lambda: udp_server("127.0.0.9", 53))
    with server, start(local_vm(), prefix=prefix) as vmd, vmd.client() as client:
        running(client, "web")
        with guest_of(vmd) as guest:
            guest.find(HOST_ADDRESS)
            question = DNS(id=99, qd=DNSQR(qname="example.org"))
            guest.send(guest.to(HOST, HOST_ADDRESS) / UDP(sport=4321, dport=53) / question)
            data, peer = server.recvfrom(1000)
            asked = DNS(data)
            assert asked.qd[0].qname == b"example.org."
            record = DNSRR(rrname="example.org", rdata="192.0.2.80")
            server.sendto(bytes(DNS(id=99, qr=1, qd=asked.qd, an=record)), peer)
            reply = guest.receive(lambda frame: DNS in frame and frame[DNS].qr == 1)
            assert reply is not None
            assert (reply[IP].src, reply[UDP].dport) == (HOST_ADDRESS, 4321)
            assert reply[DNS].an[0].rdata == "192.0.2.80"


# When processes die


def test_priv_can_be_killed(space: Namespace, start: Start) -> None:
    """If priv is killed, VMs keep interfaces and rules; a new priv makes new ones and tidies up."""
    before = space.state()
    config = (
        'local prefix 100.64.0.0/10 nat\nswitch "own" { create }\n'
        + local_vm(LOCKED, 'forward tcp "*" 8080 to 80')
        + vm_block("two", 'interface { switch "own" }', "local interface")
    )
    with start(config) as vmd, vmd.client() as client:
        running(client, "web")
        rules = space.rules()
        assert "masquerade" in rules
        assert "dport 8080" in rules
        for _ in range(2):
            os.kill(vmd.child("vmd: priv"), signal.SIGKILL)
            _eventually(lambda: bool(re.search("lost child: priv", vmd.log.read_text())))
            assert client.ask("start", name="two")["type"] == "started"
            assert space.rules() == rules
            assert client.ask("stop", name="two", force=True, wait=True)["type"] == "terminated"
            space.wait_for_links({"lo", "own", "tap0"})
        assert client.ask("stop", name="web", force=True, wait=True)["type"] == "terminated"
        _eventually(lambda: "netdev" not in space.rules() and "8080" not in space.rules())
        assert vmd.stop() == 0
    assert space.state() == before


def test_an_end_without_priv(space: Namespace, start: Start) -> None:
    """A daemon that ends while a VM waits for a dead priv process does not wait for it."""
    with start(vm_block("web", "local interface")) as vmd, vmd.client() as client:
        priv = vmd.wait_for_child("vmd: priv")
        os.kill(priv, signal.SIGSTOP)
        client.send("start", name="web")
        client.send("status", serial=1)
        assert client.receive()[0]["serial"] == 1
        vmd.process.send_signal(signal.SIGTERM)
        with vmd.client() as other:
            _eventually(lambda: other.ask("start", name="none")["code"] == "EAGAIN")
        os.kill(priv, signal.SIGKILL)
        assert vmd.process.wait(20) == 0
    space.wait_for_links({"lo"})


def test_two_daemons_leave_each_other_alone(space: Namespace, tmp_path: Path) -> None:
    """Two daemons do not touch each other's interfaces and rules."""
    config = 'local prefix {}.0.0.0/8 nat\nswitch "own{}" {{ create }}\n'
    with ExitStack() as stack:
        daemons = []
        for number in (10, 11):
            directory = tmp_path / str(number)
            directory.mkdir()
            text = config.format(number, number)
            daemon = Daemon(directory, text, is_user=False, prefix=space.prefix)
            daemons.append(stack.enter_context(daemon))
        space.wait_for_links({"lo", "own10", "own11"})
        _eventually(lambda: space.rules().count("masquerade") == 2)
        assert daemons[0].stop() == 0
        assert space.links() == {"lo", "own11"}
        assert "ip saddr 11.0.0.0/8" in space.rules()
        assert "ip saddr 10.0.0.0/8" not in space.rules()


def test_rules_of_others_are_not_touched(space: Namespace, start: Start) -> None:
    """Tables, bridges and addresses of others stay unchanged all the time."""
    theirs = "table inet mine {\nchain c {\ntype filter hook forward priority 0;\n}\n}"
    space.run("nft", theirs)
    space.run("ip", "link", "add", "br7", "address", BRIDGE, "type", "bridge")
    space.run("ip", "addr", "add", "10.9.9.9/24", "dev", "br7")
    before = space.state()
    config = (
        'local prefix 100.64.0.0/10 nat\nswitch "theirs" { interface br7\ndown\n}\n'
        + local_vm('forward tcp "*" 1 to 1')
        + vm_block("two", 'interface { switch "theirs" }', enabled=True)
    )
    with start(config) as vmd, vmd.client() as client:
        running(client, "web", "two")
        assert vmd.stop() == 0
    assert space.state() == before
