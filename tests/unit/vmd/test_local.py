"""The local process: DHCP, router advertisements and DNS for guests, with limited rates.

Socket pairs stand in for a tap's packet socket, and 127.0.0.1 for the host's addresses.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import ICMPv6ND_RA, ICMPv6ND_RS, IPv6
from scapy.layers.l2 import Ether

from tests.unit.vmd.far import Far, run_until
from vmd.local.process import QUESTIONS_MAX, RATE_MAX, Local
from vmd.wire.channel import Channel
from vmd.wire.internal import (
    LocalAddresses,
    SetVerbosity,
)
from vmd.wire.local import (
    LOCAL_AND_PARENT,
    PARENT_AND_LOCAL,
    ForgetLocal,
    LocalToParent,
    ParentToLocal,
    ServeLocal,
)
from vmm_kvm.loop import EventLoop

GUEST, HOST = "fe:e1:bb:d1:00:01", "fe:e1:bb:d1:00:02"
IPV4 = LocalAddresses(host4="100.64.1.2", guest4="100.64.1.3", host_lladdr=HOST)
IPV6 = LocalAddresses(
    host4="100.64.1.2", guest4="100.64.1.3", host_lladdr=HOST, host6="fd00::1", guest6="fd00::2"
)
QUESTION = struct.pack(">HHHHHH", 0x1234, 0x0100, 1, 0, 0, 0)
ANSWER = struct.pack(">HHHHHH", 0x1234, 0x8180, 1, 0, 0, 0)


class Rig:
    """A local process's work; the test is the parent, a guest, and the host's DNS server."""

    def __init__(self, loop: EventLoop) -> None:
        self.loop = loop
        self.server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.server.bind(("127.0.0.1", 0))
        self.parent: Far[ParentToLocal, LocalToParent] = Far(loop, PARENT_AND_LOCAL)
        self.channel = Channel(self.parent.near, LOCAL_AND_PARENT)
        self.local = Local(loop, self.server.getsockname()[1])
        self.channel.watch(loop, self.local.take, lambda _: loop.stop())
        self.guest, self._frames = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._dns.bind(("127.0.0.1", 0))
        self.dns = self._dns.getsockname()
        self.asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.asker.bind(("127.0.0.1", 0))
        for each in (self.guest, self._frames):
            each.setblocking(False)

    def serve(self, addresses: LocalAddresses = IPV4, *, resolver: str = "127.0.0.1") -> None:
        """Have the guest served."""
        message = ServeLocal(
            id=1,
            interface="vm1-if0-one",
            lladdr=GUEST,
            addresses=addresses,
            host_name="one",
            boots_from_net=True,
            dns=(1,),
            resolver=resolver,
        )
        self.parent.say(message, [self._frames.detach(), self._dns.detach()])

    def receive(self, sock: socket.socket) -> bytes:
        """Run until a packet arrives; return it."""
        found: list[bytes] = []

        def is_there() -> bool:
            try:
                found.append(sock.recv(65535))
            except BlockingIOError:
                return bool(found)
            return True

        run_until(self.loop, is_there)
        return found[0]

    def settle(self) -> None:
        """Run until all messages have been read."""
        self.loop.timer(self.loop.stop).arm(self.loop.monotonic_ns() + 20_000_000)
        self.loop.run()

    def close(self) -> None:
        """Close everything."""
        self.local.close()
        self.channel.close()
        self.parent.close()
        for each in (self.server, self.guest, self._frames, self._dns, self.asker):
            each.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Return a local process without guests yet."""
    with EventLoop() as loop:
        made = Rig(loop)
        yield made
        made.close()


def _discover() -> bytes:
    bootp = BOOTP(xid=7, flags="B", chaddr=bytes.fromhex(GUEST.replace(":", "")))
    return bytes(
        Ether(dst="ff:ff:ff:ff:ff:ff", src=GUEST)
        / IP(src="0.0.0.0", dst="255.255.255.255")
        / UDP(sport=68, dport=67)
        / bootp
        / DHCP(options=[("message-type", "discover"), "end"])
    )


def test_dhcp(rig: Rig) -> None:
    """The guest gets its address, a name, and a boot file; other frames get no answer."""
    rig.parent.say(SetVerbosity(level=1))
    rig.serve()
    rig.guest.send(b"\0" * 60)
    rig.guest.send(_discover())
    offer = Ether(rig.receive(rig.guest))
    assert offer[BOOTP].yiaddr == "100.64.1.3"
    assert offer[BOOTP].file.rstrip(b"\0") == b"auto_install"
    assert ("hostname", b"one") in offer[DHCP].options


def test_router_advertisements(rig: Rig) -> None:
    """With IPv6 the guest gets the prefix at once, and at each solicitation."""
    rig.serve(IPV6)
    assert Ether(rig.receive(rig.guest))[ICMPv6ND_RA].code == 0
    solicitation = Ether(src=GUEST, dst="33:33:00:00:00:02") / IPv6(dst="ff02::2", hlim=255)
    rig.guest.send(bytes(solicitation / ICMPv6ND_RS()))
    assert Ether(rig.receive(rig.guest)).src == HOST


def test_dns(rig: Rig) -> None:
    """A question goes to the host's server, and its answer back; other packets are dropped."""
    rig.serve()
    for data in (b"short", ANSWER, QUESTION):
        rig.asker.sendto(data, rig.dns)
    run_until(rig.loop, lambda: _has(rig.server))
    asked, upstream = rig.server.recvfrom(4096)
    assert asked == QUESTION
    rig.server.sendto(b"short", upstream)
    rig.server.sendto(b"\0\0" + ANSWER[2:], upstream)
    rig.server.sendto(ANSWER, upstream)
    assert rig.receive(rig.asker) == ANSWER
    assert not _has(rig.server)


def _has(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    return True


def test_a_dns_server_that_is_not_there(rig: Rig) -> None:
    """Without an answer the question is forgotten, and the next one is sent all the same."""
    rig.serve()
    port = rig.server.getsockname()[1]
    rig.server.close()
    rig.asker.sendto(QUESTION, rig.dns)
    rig.settle()
    rig.server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    rig.server.bind(("127.0.0.1", port))
    rig.asker.sendto(QUESTION, rig.dns)
    assert rig.receive(rig.server) == QUESTION


@pytest.mark.parametrize("resolver", ["", "::ffff:0:0:0:0"])
def test_a_host_without_a_dns_server(rig: Rig, resolver: str) -> None:
    """Guests of a host without a DNS server get DHCP, and no DNS answers."""
    rig.serve(resolver=resolver)
    rig.asker.sendto(QUESTION, rig.dns)
    rig.guest.send(_discover())
    assert rig.receive(rig.guest)
    assert not _has(rig.server)


def test_a_guest_that_asks_too_often(rig: Rig) -> None:
    """A guest above the limit is ignored until the next second; old DNS questions are dropped."""
    rig.serve()
    asked = 0
    for _ in range(RATE_MAX + 50):
        rig.asker.sendto(QUESTION, rig.dns)
        rig.loop.call_soon(rig.loop.stop)
        rig.loop.run()
        while _has(rig.server):
            rig.server.recv(4096)
            asked += 1
    assert asked == RATE_MAX
    assert QUESTIONS_MAX < RATE_MAX
    rig.guest.send(_discover())
    assert rig.receive(rig.guest)  # once the second is over


def test_a_vm_that_is_gone(rig: Rig) -> None:
    """A guest that is gone gets no answers; one whose sockets were lost never does."""
    rig.serve()
    rig.guest.send(_discover())
    assert rig.receive(rig.guest)
    rig.parent.say(ForgetLocal(id=1))
    rig.settle()
    with pytest.raises((ConnectionError, OSError)):
        rig.guest.send(_discover())


def test_the_parents_end(rig: Rig) -> None:
    """If the parent ends the loop stops, so the process ends."""
    rig.parent.channel.close()
    rig.loop.run()
