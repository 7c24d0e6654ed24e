"""The local process: it answers guests on local interfaces, on every data path.

DHCP and router advertisements go through a packet socket on the tap, DNS questions through a socket
on the host's address there, to the host's own DNS server and back. The sockets come from the
parent. The process has no privileges; it is in the host's network, which is where that server is.

A guest that asks too often is ignored for the rest of the second.

Source: section 12.5 of OpenBSD's behaviour.
"""

import socket
import struct
from collections.abc import Callable
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from itertools import count
from typing import assert_never

from vmd.shared import log as logging
from vmd.wire.channel import Fds, Received
from vmd.wire.internal import (
    SetVerbosity,
)
from vmd.wire.local import ForgetLocal, ParentToLocal, ServeLocal
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop
from vmm_kvm.net.dhcp import BOOT_FILE, Lease, answer
from vmm_kvm.net.ethernet import parse_lladdr
from vmm_kvm.net.router import INTERVAL_S, Router, advertisement, is_solicitation, link_local

log = Log(__name__)

RATE_MAX = 200
"""So many questions of one interface are answered in a second."""
QUESTIONS_MAX = 64
"""DNS questions of one interface that are waiting; beyond them the oldest is forgotten."""
DNS_PORT = 53
_DNS_HEADER_SIZE = 12
_DNS_IS_ANSWER = 0x80
_DNS_WAIT_NS = 5 * NANOSECONDS
_FRAME_MAX = 2048
_DATAGRAM_MAX = 65535
_SOL_PACKET = 263
_PACKET_AUXDATA = 8
_AUXDATA = struct.Struct("=IIIHHHH")  # struct tpacket_auxdata
_CHECKSUM_IS_MISSING = 8  # TP_STATUS_CSUMNOTREADY


_Address = tuple[str, int] | tuple[str, int, int, int]


class _Question:
    """A DNS question on its way."""

    __slots__ = ("asker", "id", "reply_by", "upstream")

    def __init__(
        self, upstream: socket.socket, asker: _Address, number: bytes, reply_by: socket.socket
    ) -> None:
        self.upstream = upstream
        self.asker = asker
        self.id = number
        self.reply_by = reply_by


class Service:
    """Answers one guest on one local interface. For one thread."""

    def __init__(self, loop: EventLoop, message: ServeLocal, fds: Fds, dns_port: int) -> None:
        """Begin to answer; takes over the sockets. The host's DNS server is at `dns_port`."""
        self._loop = loop
        self._dns_port = dns_port
        self._interface = message.interface
        self._resolver = message.resolver
        addresses = message.addresses
        self._lease = Lease(
            guest_lladdr=parse_lladdr(message.lladdr),
            host_lladdr=parse_lladdr(addresses.host_lladdr),
            guest=IPv4Address(addresses.guest4).packed,
            host=IPv4Address(addresses.host4).packed,
            host_name=message.host_name.encode("ascii", "ignore"),
            boot_file=BOOT_FILE if message.boots_from_net else b"",
        )
        self._router: Router | None = None
        if addresses.host6:
            host = IPv6Address(addresses.host6).packed
            lladdr = self._lease.host_lladdr
            self._router = Router(lladdr, link_local(lladdr), host[:8] + bytes(8), host)
        self._frames = socket.socket(fileno=fds.take(message.frames))
        self._dns = [socket.socket(fileno=fds.take(at)) for at in message.dns]
        self._questions: dict[int, _Question] = {}
        self._numbers = count()
        self._asked = 0
        self._second_ends = loop.timer(self._listen_again)
        self._advertise_timer = loop.timer(self._advertise)
        self._readers: dict[int, Callable[[], None]] = {self._frames.fileno(): self._read_frame}
        for dns in self._dns:
            self._readers[dns.fileno()] = partial(self._read_question, dns)
        self._listen()
        self._advertise()

    def close(self) -> None:
        """Answer no more."""
        self._second_ends.cancel()
        self._advertise_timer.cancel()
        self._hush()
        for number in tuple(self._questions):
            self._forget(number)
        for each in (self._frames, *self._dns):
            each.close()

    # How often

    def _listen(self) -> None:
        for fd, read in self._readers.items():
            self._loop.add_reader(fd, read)

    def _hush(self) -> None:
        for fd in self._readers:
            self._loop.remove_reader(fd)

    def _count(self) -> None:
        """Count a question; after one too many the guest is ignored until the second is over."""
        if self._asked == 0:
            self._second_ends.arm(self._loop.monotonic_ns() + NANOSECONDS)
        self._asked += 1
        if self._asked == RATE_MAX:
            log.debug("%s: the guest asks too often", self._interface)
            self._hush()

    def _listen_again(self) -> None:
        was_hushed = self._asked >= RATE_MAX
        self._asked = 0
        if was_hushed:
            self._listen()

    # DHCP, router advertisements

    def _read_frame(self) -> None:
        try:
            frame, ancillary, _, _ = self._frames.recvmsg(
                _FRAME_MAX, socket.CMSG_SPACE(_AUXDATA.size)
            )
        except BlockingIOError:
            return
        except OSError as err:  # the interface is down; if it goes, the parent tells us
            log.debug("%s: %s", self._interface, err)
            self._count()
            return
        self._count()
        reply = answer(frame, self._lease, is_summed=_is_summed(ancillary))
        if reply is not None:
            self._send(reply)
        elif self._router and is_solicitation(frame, self._lease.guest_lladdr):
            self._send(advertisement(self._router))

    def _send(self, frame: bytes) -> None:
        try:
            self._frames.send(frame)
        except OSError as err:  # no room, or the interface is down: the guest asks again
            log.debug("%s: %s", self._interface, err)

    def _advertise(self) -> None:
        if self._router:
            self._send(advertisement(self._router))
            self._advertise_timer.arm(self._loop.monotonic_ns() + INTERVAL_S * NANOSECONDS)

    # DNS

    def _read_question(self, dns: socket.socket) -> None:
        try:
            data, asker = dns.recvfrom(_DATAGRAM_MAX)
        except OSError as err:  # an error that an earlier answer came back with, or none
            log.debug("%s: %s", self._interface, err)
            return
        self._count()
        if len(data) < _DNS_HEADER_SIZE or data[2] & _DNS_IS_ANSWER or not self._resolver:
            return
        if len(self._questions) >= QUESTIONS_MAX:
            self._forget(next(iter(self._questions)))
        family = socket.AF_INET6 if ":" in self._resolver else socket.AF_INET
        try:
            # A socket of its own: its port is as hard to guess as the kernel makes it.
            upstream = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        except OSError as err:
            log.debug("%s: DNS: %s", self._interface, err)
            return
        number = next(self._numbers)
        self._questions[number] = _Question(upstream, asker, data[:2], dns)
        try:
            upstream.connect((self._resolver, self._dns_port))
            upstream.send(data)
        except OSError as err:
            log.debug("%s: DNS: %s", self._interface, err)
            self._forget(number)
            return
        self._loop.add_reader(upstream.fileno(), lambda: self._read_answer(number))
        timer = self._loop.timer(lambda: self._forget(number))
        timer.arm(self._loop.monotonic_ns() + _DNS_WAIT_NS)

    def _read_answer(self, number: int) -> None:
        question = self._questions[number]
        try:
            data = question.upstream.recv(_DATAGRAM_MAX)
        except BlockingIOError:
            return
        except OSError as err:
            log.debug("%s: DNS: %s", self._interface, err)
            self._forget(number)
            return
        if len(data) < _DNS_HEADER_SIZE or data[:2] != question.id:
            return
        self._forget(number)
        try:
            question.reply_by.sendto(data, question.asker)
        except OSError as err:
            log.debug("%s: DNS: %s", self._interface, err)

    def _forget(self, number: int) -> None:
        question = self._questions.pop(number, None)
        if question is not None:
            self._loop.remove_reader(question.upstream.fileno())
            question.upstream.close()


class Local:
    """The local process's work, on the event loop's thread."""

    def __init__(self, loop: EventLoop, dns_port: int = DNS_PORT) -> None:
        """Begin without guests; the host's DNS server is at `dns_port`."""
        self._loop = loop
        self._dns_port = dns_port
        self._services: dict[int, list[Service]] = {}

    def take(self, received: Received[ParentToLocal]) -> None:
        """Obey a message."""
        with received.fds as fds:
            match received.message:
                case ServeLocal(id=vm_id, interface=interface) if fds.are_lost:
                    log.warning("%s: not served: no descriptors left", interface)
                case ServeLocal(id=vm_id):
                    service = Service(self._loop, received.message, fds, self._dns_port)
                    self._services.setdefault(vm_id, []).append(service)
                case ForgetLocal(id=vm_id):
                    for service in self._services.pop(vm_id, []):
                        service.close()
                case SetVerbosity(level=level):
                    logging.set_verbosity(level)
                case _:
                    assert_never(received.message)

    def close(self) -> None:
        """Stop serving guests."""
        for services in self._services.values():
            for service in services:
                service.close()
        self._services.clear()


def _is_summed(ancillary: list[tuple[int, int, bytes]]) -> bool:
    """Tell whether a frame has its checksum, according to the kernel.

    Source: packet(7), PACKET_AUXDATA.
    """
    for level, kind, data in ancillary:
        if (level, kind) == (_SOL_PACKET, _PACKET_AUXDATA) and len(data) >= _AUXDATA.size:
            status: int = _AUXDATA.unpack_from(data)[0]
            return not status & _CHECKSUM_IS_MISSING
    return True
