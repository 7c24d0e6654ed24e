"""Clones and the network: each reaches the host by its own addresses, and none another."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from scapy.layers.inet import UDP
from scapy.packet import Packet, Raw

from tests.system.vmd.daemon import READY, Client, Daemon, vm_block
from tests.system.vmd.netns import Namespace, TapGuest, udp_server

pytestmark = [pytest.mark.kvm, pytest.mark.root, pytest.mark.usefixtures("networks")]

CLONES = 20
PORT = 5300
QUIET_S = 0.5


def _guest(vmd: Daemon, client: Client, name: str) -> tuple[TapGuest, str]:
    """Return a clone's end of its tap, and the host's address there."""
    vms = client.ask("status", name=name, interfaces=True)["vms"]
    assert isinstance(vms, list)
    (one,) = vms[0]["interfaces"]
    address, host = (
        str(one[field][0]).partition("/")[0] for field in ("guest_addresses", "host_addresses")
    )
    return TapGuest(vmd.process.pid, one["tap"], one["lladdr"], address), host


def test_twenty_clones_reach_the_host_and_not_each_other(tmp_path: Path) -> None:
    """Each has the template's lladdr and an address of its own; the host forwards for NAT."""
    config = "local prefix 100.64.0.0/10 nat\n" + vm_block("template", "local interface")
    with (
        Namespace() as space,
        Daemon(tmp_path, config, is_user=False, prefix=space.prefix) as vmd,
        vmd.client() as client,
        space.within(lambda: udp_server("0.0.0.0", PORT)) as server,
        ExitStack() as stack,
    ):
        assert client.ask("start", name="template", is_template=True)["type"] == "started"
        with client.console("template") as console:
            console.expect(READY)
        assert client.ask("pause", name="template")["type"] == "done"
        cloned = client.ask("clone", name="template", clone="c%d", count=CLONES)
        assert cloned["type"] == "cloned", cloned
        guests: dict[str, TapGuest] = {}
        routers: dict[str, str] = {}
        for number in range(1, CLONES + 1):
            guest, host = _guest(vmd, client, f"c{number}")
            guests[guest.address] = stack.enter_context(guest)
            routers[guest.address] = guest.find(host)
            datagram = UDP(sport=PORT, dport=PORT) / Raw(guest.address.encode())
            guest.send(guest.to(routers[guest.address], host) / datagram)
            data, (source, _) = server.recvfrom(100)
            assert (data.decode(), source) == (guest.address, guest.address)
        assert len(guests) == CLONES
        addresses = list(guests)
        for address, other in zip(addresses, [*addresses[1:], addresses[0]], strict=True):
            secret = UDP(sport=PORT, dport=PORT) / Raw(b"secret")
            guests[address].send(guests[address].to(routers[address], other) / secret)
        for guest in guests.values():
            assert guest.receive(_is_secret, QUIET_S / CLONES) is None


def _is_secret(frame: Packet) -> bool:
    return Raw in frame and bytes(frame[Raw]) == b"secret"
