"""virtio-vsock: streams in both directions, credit, ends of each kind, and hostile guests."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.virtio.vsock_rig import PORTS, Rig
from tests.virtio_driver import DriverQueue
from tests.vsock_driver import CID, Got, GuestStream, VsockDriver
from vmm_kvm.errors import StateError, VirtqueueError
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.device import Backend
from vmm_kvm.virtio.vsock import (
    CONNECTIONS_MAX,
    EVENT_QUEUE,
    RECEIVE_QUEUE,
    REPLIES_MAX,
    TRANSMIT_QUEUE,
    VsockState,
)
from vmm_kvm.virtio.vsock_connection import UPDATE, WINDOW
from vmm_kvm.virtio.vsock_packet import HEADER_SIZE, HOST_CID, STREAM, Header, Op, Shutdown


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A rig whose driver has offered its buffers."""
    one = Rig()
    one.driver.offer()
    yield one
    one.close()


def ops(packets: list[Got]) -> list[int]:
    """Return the packets' operations."""
    return [packet.op for packet in packets]


def ended(sock: socket.socket) -> bool:
    """Tell whether the other end has shut down."""
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False


def pump(rig: Rig, stream: GuestStream) -> None:
    """Take the packets of one connection, and return their buffers."""
    for packet in rig.driver.packets():
        stream.take(packet)
    rig.driver.offer()


def test_what_it_is(rig: Rig) -> None:
    """The device has three queues, the guest's address, no features: stream sockets alone."""
    backend: Backend = rig.device
    assert backend.device_id == abi.VIRTIO_ID_VSOCK
    assert backend.features == 0
    assert len(backend.queue_sizes) == 3
    assert backend.config() == CID.to_bytes(8, "little")
    backend.write_config(0, b"\xff")
    assert backend.config() == CID.to_bytes(8, "little")


def test_the_guest_connects(rig: Rig) -> None:
    """Data arrive in both directions; every packet has both addresses."""
    stream, sock = rig.from_guest()
    assert stream.write(b"question") == 8
    assert sock.recv(64) == b"question"
    sock.send(b"answer")
    rig.serve()
    (packet,) = rig.driver.packets()
    assert packet == (
        Header(HOST_CID, CID, 7, 1024, 6, STREAM, Op.RW, 0, WINDOW, 8),
        b"answer",
    )


def test_nobody_listens(rig: Rig) -> None:
    """A port of the host without a listener answers with RST."""
    rig.driver.send(Op.REQUEST, (1024, 10))
    (packet,) = rig.driver.packets()
    assert packet == (Header(HOST_CID, CID, 10, 1024, 0, STREAM, Op.RST, 0, 0, 0), b"")


def test_the_host_connects(rig: Rig) -> None:
    """The client reads OK once the guest has accepted; its earlier data follow then."""
    sock = rig.connect()
    sock.send(b"early")
    (request,) = rig.driver.packets()
    assert (request.op, request.header.dst_port) == (Op.REQUEST, 22)
    rig.serve()
    assert rig.driver.packets() == []
    rig.driver.send(Op.RESPONSE, (22, request.header.src_port))
    assert sock.recv(64) == b"OK %d\n" % request.header.src_port
    assert [packet.data for packet in rig.driver.packets()] == [b"early"]


def test_connections_of_the_host_have_ports_of_their_own(rig: Rig) -> None:
    """Two clients of one port are two connections."""
    (one, first), (other, second) = rig.from_host(), rig.from_host()
    assert one.ports != other.ports
    one.write(b"one")
    other.write(b"other")
    assert (first.recv(64), second.recv(64)) == (b"one", b"other")


def test_the_guest_refuses(rig: Rig) -> None:
    """If the guest refuses, the client reads the end of the file, and no OK."""
    sock = rig.connect()
    (request,) = rig.driver.packets()
    rig.driver.send(Op.RST, (22, request.header.src_port))
    assert ended(sock)
    assert rig.driver.packets() == []


def test_a_client_that_goes_before_the_guest_answers(rig: Rig) -> None:
    """If the client closes early, the guest is reset, and its late answer is refused."""
    sock = rig.connect()
    (request,) = rig.driver.packets()
    sock.close()
    rig.serve()
    assert ops(rig.driver.packets()) == [Op.RST]
    rig.driver.send(Op.RESPONSE, (22, request.header.src_port))
    assert ops(rig.driver.packets()) == [Op.RST]


def test_without_a_driver_clients_are_sent_away() -> None:
    """Without a driver, or after its reset, a client reads the end of the file at once."""
    rig = Rig(is_started=False)
    assert ended(rig.connect())
    rig.device.start(0)
    waiting = rig.connect()
    assert not ended(waiting)  # the driver has offered no buffers yet
    rig.device.reset()
    assert ended(waiting)
    assert ended(rig.connect())
    rig.close()


# Credit


def test_a_slow_host_holds_the_guest(rig: Rig) -> None:
    """At most one window waits for a slow host; the guest gets credit as it drains."""
    stream, sock = rig.from_guest()
    while stream.credit():
        stream.write(bytes(0x8000))
        pump(rig, stream)
    rig.driver.taken()
    received = 0
    while not stream.credit():
        received += len(sock.recv(0x8000))
        rig.serve()
        pump(rig, stream)
    assert stream.credit() >= UPDATE
    assert received <= WINDOW + 0x80000  # plus the sockets' own buffer


def test_more_than_there_is_credit_for(rig: Rig) -> None:
    """A guest that sends more than its credit is reset, and all waiting data are dropped."""
    stream, sock = rig.from_guest()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    packets: list[Got] = []
    for _ in range(40):
        rig.driver.send(Op.RW, stream.ports, bytes(0x10000))
        packets += rig.driver.packets()
        rig.driver.offer()
        if Op.RST in ops(packets):
            break
    assert packets[-1].op == Op.RST
    while sock.recv(0x10000):
        pass


def test_the_guest_asks_for_credit(rig: Rig) -> None:
    """A request for credit is answered by an update."""
    stream, _sock = rig.from_guest()
    rig.driver.send(Op.CREDIT_REQUEST, stream.ports)
    (packet,) = rig.driver.packets()
    assert packet.op == Op.CREDIT_UPDATE
    assert (packet.header.buf_alloc, packet.header.fwd_cnt) == (WINDOW, 0)


def test_a_guest_without_room(rig: Rig) -> None:
    """A guest gets no more than it has room for, one request, and the rest when it has room."""
    ports = PORTS
    rig.driver.send(Op.REQUEST, ports, buf_alloc=10)
    assert ops(rig.driver.packets()) == [Op.RESPONSE]
    sock = rig.dialled[-1]
    sock.send(b"0123456789abcdef")
    rig.serve()
    data, question = rig.driver.packets()
    assert (data.data, question.op) == (b"0123456789", Op.CREDIT_REQUEST)
    rig.serve()
    assert rig.driver.packets() == []
    rig.driver.send(Op.CREDIT_UPDATE, ports, buf_alloc=10, fwd_cnt=4)
    data, question = rig.driver.packets()
    assert (data.data, question.op) == (b"abcd", Op.CREDIT_REQUEST)
    rig.driver.send(Op.CREDIT_UPDATE, ports, buf_alloc=0xFFFF_FFFF, fwd_cnt=14)
    (data,) = rig.driver.packets()
    assert data.data == b"ef"


def test_counts_go_round_at_4_gib(rig: Rig) -> None:
    """A fwd_cnt before the beginning counts as no room, and is no fault."""
    rig.driver.send(Op.REQUEST, PORTS, buf_alloc=0x1000, fwd_cnt=0xFFFF_F000)
    assert ops(rig.driver.packets()) == [Op.RESPONSE, Op.CREDIT_REQUEST]
    rig.dialled[-1].send(b"x")
    rig.serve()
    assert rig.driver.packets() == []
    rig.driver.send(Op.CREDIT_UPDATE, PORTS, buf_alloc=0x1001, fwd_cnt=0xFFFF_F000)
    packet, question = rig.driver.packets()
    assert (packet.data, question.op) == (b"x", Op.CREDIT_REQUEST)


def test_a_guest_without_buffers(rig: Rig) -> None:
    """Without buffers data stay in their sockets; then both connections get their turns."""
    (one, first), (other, second) = rig.from_guest(), rig.from_guest((1025, 8))
    rig.driver.offer(0)
    for _ in range(14 - len(rig.driver.packets())):  # use the buffers up
        rig.driver.send(Op.RST + 20, (1, 1))
    rig.driver.packets()
    first.send(bytes(20000))
    second.send(bytes(20000))
    rig.serve()
    assert rig.driver.packets() == []
    before = rig.rounds
    rig.serve()
    assert rig.rounds == before + 1
    rig.driver.offer(4)
    ports = [packet.header.dst_port for packet in rig.driver.packets()]
    assert sorted(ports) == [1024, 1024, 1025, 1025]
    assert (one.ports, other.ports) == (PORTS, (1025, 8))


# Ends


def test_the_guest_sends_no_more(rig: Rig) -> None:
    """When the guest shuts down sending, the host reads the end after all data, and may send."""
    stream, sock = rig.from_guest()
    stream.write(b"last")
    stream.shut(Shutdown.SEND)
    assert sock.recv(64) == b"last"
    assert ended(sock)
    sock.send(b"more")
    rig.serve()
    assert [packet.data for packet in rig.driver.packets()] == [b"more"]


def test_the_guest_receives_no_more(rig: Rig) -> None:
    """When the guest shuts down receiving, the host's next write fails; the guest may send."""
    stream, sock = rig.from_guest()
    stream.shut(Shutdown.RECEIVE)
    with pytest.raises(BrokenPipeError):
        sock.send(b"x")
    stream.write(b"still")
    assert sock.recv(64) == b"still"
    assert rig.driver.packets() == []


def test_the_guest_closes(rig: Rig) -> None:
    """A close of the guest gets RST at once; its earlier data still reach the host."""
    stream, sock = rig.from_guest()
    data = bytes(range(256)) * 256
    sent = bytearray()
    while stream.credit():
        count = stream.write(data)
        sent += data[:count]
        pump(rig, stream)
    stream.shut(Shutdown.BOTH)
    assert ops(rig.driver.packets()) == [Op.RST]
    rig.from_guest()  # the same ports again
    received = bytearray()
    while not received.endswith(sent[-1:]) or len(received) < len(sent):
        received += sock.recv(0x10000)
        rig.serve()
    assert received == sent
    assert ended(sock)


def test_ends_in_two_steps(rig: Rig) -> None:
    """RECEIVE after SEND counts as both, though each packet has one."""
    stream, sock = rig.from_guest()
    stream.shut(Shutdown.SEND)
    stream.shut(Shutdown.RECEIVE)
    assert ops(rig.driver.packets()) == [Op.RST]
    assert ended(sock)


def test_the_host_sends_no_more(rig: Rig) -> None:
    """When the host shuts down sending, the guest learns it after all data, and may still send."""
    stream, sock = rig.from_guest()
    sock.send(b"last")
    sock.shutdown(socket.SHUT_WR)
    rig.serve()
    data, end = rig.driver.packets()
    assert data.data == b"last"
    assert (end.op, end.header.flags) == (Op.SHUTDOWN, Shutdown.SEND)
    stream.write(b"still")
    assert sock.recv(64) == b"still"
    stream.shut(Shutdown.SEND)
    (end,) = rig.driver.packets()
    assert (end.op, end.header.flags) == (Op.SHUTDOWN, Shutdown.BOTH)


def test_the_host_closes(rig: Rig) -> None:
    """When the host closes, the guest gets all data, then both shutdowns."""
    stream, sock = rig.from_guest()
    sock.send(b"last")
    sock.close()
    rig.serve()
    data, end = rig.driver.packets()
    assert data.data == b"last"
    assert (end.op, end.header.flags) == (Op.SHUTDOWN, Shutdown.BOTH)
    stream.write(b"to nobody")
    rig.driver.send(Op.RST, stream.ports)
    assert rig.driver.packets() == []
    rig.from_guest()


def test_data_for_a_host_that_is_gone(rig: Rig) -> None:
    """A guest whose receiver is gone is told, and its later data use no credit."""
    stream, sock = rig.from_guest()
    sock.shutdown(socket.SHUT_RD)
    stream.write(b"x")
    (end,) = rig.driver.packets()
    assert (end.op, end.header.flags) == (Op.SHUTDOWN, Shutdown.RECEIVE)
    stream.take(end)
    for _ in range(2 * WINDOW // 0x8000):
        assert stream.write(bytes(0x8000)) == 0x8000
        pump(rig, stream)


def test_a_host_that_never_reads_is_no_room_for_others() -> None:
    """Connections that the host never reads are limited; ended ones do not count."""
    rig = Rig(buffers=32)
    rig.driver.offer()
    for number in range(CONNECTIONS_MAX):
        rig.driver.send(Op.REQUEST, (2000 + number, 7))
        assert ops(rig.driver.packets()) == [Op.RESPONSE]
        rig.driver.offer()
    rig.driver.send(Op.REQUEST, (1, 7))
    assert ops(rig.driver.packets()) == [Op.RST]
    assert ended(rig.connect())
    rig.dialled[3].close()  # the guest does not react
    rig.serve()
    assert ops(rig.driver.packets()) == [Op.SHUTDOWN]
    rig.driver.offer()
    rig.driver.send(Op.REQUEST, (1, 7))
    found = rig.driver.packets()
    assert sorted((p.op, p.header.dst_port) for p in found) == [(Op.RESPONSE, 1), (Op.RST, 2003)]
    rig.close()


# Packets that no guest should send


@pytest.mark.parametrize("op", [Op.RESPONSE, Op.SHUTDOWN, Op.RW, Op.CREDIT_UPDATE, 0, 8, 0xFFFF])
def test_packets_of_no_connection(rig: Rig, op: int) -> None:
    """A packet without a connection is answered with RST; a RST is not."""
    rig.driver.send(op, (5, 6))
    (packet,) = rig.driver.packets()
    assert (packet.op, packet.header.src_port, packet.header.dst_port) == (Op.RST, 6, 5)
    rig.driver.send(Op.RST, (5, 6))
    assert rig.driver.packets() == []


@pytest.mark.parametrize("op", [Op.REQUEST, Op.RESPONSE, 0, 8, 0xFFFF])
def test_packets_that_end_a_connection(rig: Rig, op: int) -> None:
    """An operation that an open connection does not allow ends it."""
    stream, sock = rig.from_guest()
    rig.driver.send(op, stream.ports)
    assert ops(rig.driver.packets()) == [Op.RST]
    assert ended(sock)


@pytest.mark.parametrize("op", [Op.RW, Op.SHUTDOWN, Op.CREDIT_UPDATE, Op.CREDIT_REQUEST])
def test_packets_before_the_guest_has_accepted(rig: Rig, op: int) -> None:
    """A packet before the guest's answer to the request ends the connection."""
    sock = rig.connect()
    (request,) = rig.driver.packets()
    rig.driver.send(op, (22, request.header.src_port))
    assert ops(rig.driver.packets()) == [Op.RST]
    assert ended(sock)


@pytest.mark.parametrize("length", [0, 4, 6, 0xFFFF_FFFF])
def test_a_length_that_is_not_the_datas(rig: Rig, length: int) -> None:
    """A length below the data's takes fewer bytes; one above ends the connection."""
    stream, sock = rig.from_guest()
    rig.driver.send(Op.RW, stream.ports, b"12345", length=length)
    if length < 5:
        stream.write(b"x")
        assert sock.recv(64) == b"12345"[:length] + b"x"
    else:
        assert ops(rig.driver.packets()) == [Op.RST]
        assert ended(sock)


def test_other_addresses_and_types(rig: Rig) -> None:
    """Other types or targets are refused; packets from another address are ignored."""
    stream, sock = rig.from_guest()
    for fields in ({"dst_cid": 9}, {"dst_cid": 1 << 63}, {"type": 2}, {"type": 0xFFFF}):
        rig.driver.send(Op.REQUEST, PORTS, b"", **fields)
        (packet,) = rig.driver.packets()
        assert packet.op == Op.RST
        assert packet.header.src_cid == fields.get("dst_cid", HOST_CID)
        assert packet.header.type == fields.get("type", STREAM)
        rig.driver.send(Op.RST, PORTS, b"", **fields)
        assert rig.driver.packets() == []
    for cid in (0, 1, 2, 4, 1 << 40):
        rig.driver.send(Op.RST, PORTS, src_cid=cid)
    rig.driver.send_raw(bytes(HEADER_SIZE - 1))
    rig.driver.send_raw(b"x")
    assert rig.driver.packets() == []
    stream.write(b"still")
    assert sock.recv(64) == b"still"


def test_a_flood_without_room_for_replies() -> None:
    """Packets that need replies stay in the guest's queue while there is no room for replies."""
    rig = Rig()
    for number in range(REPLIES_MAX + 40):
        rig.driver.send(Op.RW, (number, 5))
    assert rig.driver.taken() == REPLIES_MAX
    before = rig.rounds
    rig.serve()
    assert rig.rounds == before + 1, "it goes round in vain"
    found = 0
    for _ in range(20):
        rig.driver.offer()
        found += len(rig.driver.packets())
    assert found == REPLIES_MAX + 40
    assert rig.driver.taken() == 40
    rig.close()


@pytest.mark.parametrize("size", [1, HEADER_SIZE - 1, HEADER_SIZE])
def test_receive_buffers_without_room(size: int) -> None:
    """A buffer without room for data is the driver's fault; all connections end."""
    rig = Rig()
    waiting = rig.connect()
    rig.queues[RECEIVE_QUEUE].add((0x20000, size, True))
    with pytest.raises(VirtqueueError, match=f"a receive buffer of {size} bytes"):
        rig.device.process(RECEIVE_QUEUE, rig.sides[RECEIVE_QUEUE])
    assert ended(waiting)
    assert ended(rig.connect())
    rig.close()


def test_headers_and_data_divided_in_any_way(rig: Rig) -> None:
    """A packet may be in buffers of any sizes, in both directions."""
    stream, sock = rig.from_guest()
    memory = rig.memory.bytes
    packet = Header(CID, HOST_CID, *PORTS, 6, STREAM, Op.RW, 0, 1 << 20, 0).pack() + b"pieces"
    memory[0xA0000 : 0xA0000 + len(packet)] = packet
    rig.queues[TRANSMIT_QUEUE].add(
        (0xA0000, 3, False), (0xA0003, 43, False), (0xA002E, 1, False), (0xA002F, 3, False)
    )
    rig.serve()
    assert sock.recv(64) == b"pieces"
    one = Rig()
    one.queues[RECEIVE_QUEUE].add((0xA0000, 40, True), (0xA1000, 6, True), (0xA2000, 100, True))
    one.queues[RECEIVE_QUEUE].add((0xA3000, 40, True), (0xA4000, 6, True), (0xA5000, 100, True))
    one.driver.send(Op.REQUEST, PORTS)
    one.dialled[0].send(b"data")
    one.serve()
    assert one.queues[RECEIVE_QUEUE].used() == [(0, HEADER_SIZE), (3, HEADER_SIZE + 4)]
    assert one.memory.bytes[0xA4004:0xA4006] + one.memory.bytes[0xA5000:0xA5002] == b"data"
    one.close()
    assert stream.ports == PORTS


# State


def test_a_restored_guest_is_told() -> None:
    """A restored guest gets TRANSPORT_RESET at its first buffer; its old packets are refused."""
    rig = Rig()
    rig.device.restore(VsockState(cid=CID))
    rig.driver.offer()
    waiting = rig.connect()
    assert rig.driver.packets() == []  # a connection before it would end by it
    rig.driver.send(Op.RW, PORTS, b"old")
    assert ops(rig.driver.packets()) == [Op.RST]
    rig.driver.offer_event()
    assert rig.driver.events() == [0]
    rig.serve()
    assert rig.driver.packets() == []  # the guest may not have handled the event yet
    rig.driver.offer_event()
    assert rig.driver.events() == []
    assert ops(rig.driver.packets()) == [Op.REQUEST]
    assert not ended(waiting)
    rig.close()


def test_a_guest_without_a_driver_is_not_told() -> None:
    """A guest without a driver at the restore gets no event."""
    rig = Rig(is_started=False)
    rig.device.restore(VsockState(cid=CID))
    rig.device.start(0)
    rig.driver.offer_event()
    assert rig.driver.events() == []
    rig.close()


def test_a_state_of_another_address(rig: Rig) -> None:
    """A state with another address is refused."""
    with pytest.raises(StateError, match=r"^cid: 4 is not this device's, 3$"):
        rig.device.restore(VsockState(cid=4))


def test_another_machine(rig: Rig) -> None:
    """A copy drops the connections, and its guest is told."""
    _stream, sock = rig.from_guest()
    waiting = rig.connect()
    rig.device.become_another()
    assert ended(sock)
    assert ended(waiting)
    rig.driver.offer_event()
    assert rig.driver.events() == [0]
    rig.driver.packets()
    rig.from_guest()


def test_a_reset_ends_everything(rig: Rig) -> None:
    """After a reset the driver starts again, without connections, and with new queues."""
    _stream, sock = rig.from_guest()
    rig.device.reset()
    assert ended(sock)
    rig.queues = {index: DriverQueue(rig.memory, 256, 0x4000 * (index + 1)) for index in range(3)}
    rig.memory.bytes[0x4000:0x10000] = bytes(0xC000)
    rig.sides = {index: queue.device(rig.memory) for index, queue in rig.queues.items()}
    rig.driver = VsockDriver(rig.queues, 0x20000, rig.notify)
    rig.device.start(0)
    rig.driver.offer()
    rig.from_guest()
    assert rig.device.save() == VsockState(cid=CID)
    assert {EVENT_QUEUE} <= rig.sides.keys()


@settings(deadline=None, max_examples=40)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["guest", "host", "read", "take"]), st.integers(1, 200_000)),
        max_size=60,
    ),
    room=st.sampled_from([100, 5000, 1 << 18]),
)
def test_no_byte_is_lost(steps: list[tuple[str, int]], room: int) -> None:
    """In any order of writes and reads, both sides read all written data."""
    rig = Rig()
    rig.driver.offer()
    rig.driver.send(Op.REQUEST, PORTS, buf_alloc=room)
    stream = GuestStream(rig.driver, PORTS, room)
    pump(rig, stream)
    sock = rig.dialled[0]
    pattern = bytes(i * 7 % 251 for i in range(251)) * 1000
    from_guest, from_host, read = bytearray(), bytearray(), bytearray()

    def do(what: str, size: int) -> None:
        if what == "guest":
            from_guest.extend(pattern[: stream.write(pattern[:size])])
        elif what == "host":
            with suppress(BlockingIOError):
                from_host.extend(pattern[: sock.send(pattern[:size])])
            rig.serve()
        elif what == "read":
            with suppress(BlockingIOError):
                read.extend(sock.recv(size))
            rig.serve()
        else:
            pump(rig, stream)

    for what, size in steps:
        do(what, size)
    for _ in range(20_000):
        if len(read) == len(from_guest) and len(stream.received) == len(from_host):
            break
        do("read", 1 << 20)
        do("take", 0)
        if len(stream.received) < len(from_host):
            stream.update()
    assert read == from_guest
    assert stream.received == from_host
    rig.close()
