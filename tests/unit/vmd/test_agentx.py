"""The agentx process: its answers to a master agent of AgentX, also a hostile one.

The test is the master, over a socket, and the parent, over a channel.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise

import pytest

from tests.unit.vmd import master_agent as master
from tests.unit.vmd.far import Far, run_until
from tests.unit.vmd.master_agent import Oid
from vmd.agentx.mib import BINDINGS_MAX, REGION, Mib
from vmd.agentx.pdu import Header, PduError, PduType, Range, Request, parse, parse_header
from vmd.agentx.process import RETRY_S, SOFTWARE, Agentx
from vmd.wire.agentx import (
    AGENTX_AND_PARENT,
    PARENT_AND_AGENTX,
    AgentxToParent,
    AskVms,
    Connect,
    Connected,
    NotConnected,
    ParentToAgentx,
    SetSession,
    VmRow,
    VmTable,
)
from vmd.wire.channel import Channel
from vmd.wire.messages import State, VmInfo
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.loop import EventLoop

MIB = 1 << 20
ENTRY: Oid = (*REGION, 1, 4, 1)
SESSION = 77
RETRY = 0.2


def row(number: int, name: str, state: State, *, is_enabled: bool = True) -> VmRow:
    """Return a VM of the table."""
    vm = VmInfo(id=number, name=name, state=state, cpus=2, memory=512 * MIB, memory_used=9 * MIB)
    return VmRow(vm=vm, is_enabled=is_enabled)


ROWS = (
    row(3, "web", State.RUNNING),
    row(1, "db", State.PAUSED),
    row(12, "old", State.STOPPED, is_enabled=False),
    row(5, "bye", State.STOPPING),
)


# The table


def walk(mib: Mib, start: Oid = REGION) -> list[Oid]:
    """Return all names from a start on, as GETNEXT finds them."""
    names: list[Oid] = []
    while True:
        found = mib.following(Range(start, False, ()))
        if found.value.content is None:
            return names
        start = found.name
        names.append(start)


def test_a_walk_finds_every_variable_once_in_order() -> None:
    """A walk finds scalars, then the table by columns, and by id in each."""
    names = walk(Mib(SOFTWARE, "1.0", ROWS))
    columns = [(*ENTRY, column, number) for column in range(2, 16) for number in (1, 3, 5, 12)]
    scalars = [(*REGION, 1, 1, 1, 0), (*REGION, 1, 1, 2, 0), (*REGION, 1, 1, 3, 0)]
    assert names == [*scalars, (*REGION, 1, 2, 0), *columns]
    assert all(a < b for a, b in pairwise(names))


@pytest.mark.parametrize(
    ("number", "values"),
    [
        (3, (b"web", b"", b"", 1, 4, 2, 1, 2, 2, 2, MIB, 9, -1, 512)),
        (1, (b"db", b"", b"", 3, 8, 2, 1, 2, 2, 2, MIB, 9, -1, 512)),
        (12, (b"old", b"", b"", 4, 11, 3, 1, 2, 2, 2, MIB, 9, -1, 512)),
        (5, (b"bye", b"", b"", 1, 4, 2, 1, 2, 2, 2, MIB, 9, -1, 512)),
    ],
)
def test_a_vm_has_the_values_of_openbsd(number: int, values: tuple[int | bytes, ...]) -> None:
    """Each column of a VM is right, in each state."""
    mib = Mib(SOFTWARE, "1.0", ROWS)
    found = [mib.get((*ENTRY, column, number)).value.content for column in range(2, 16)]
    assert tuple(found) == values


@pytest.mark.parametrize("seed", range(20))
def test_ranges_are_what_an_exact_oracle_says(seed: int) -> None:
    """GETNEXT is right for random ranges, with an end, and with the start itself."""
    rng = random.Random(seed)
    mib = Mib(SOFTWARE, "1.0", ROWS)
    names = walk(mib)

    def some() -> Oid:
        name = rng.choice(names)
        return rng.choice([name, name[:-1], (*name, 0), (*name[:-1], name[-1] + 1), REGION])

    for _ in range(200):
        start, end, is_included = some(), rng.choice([(), some()]), rng.random() < 0.5
        inside = [
            name
            for name in names
            if (name >= start if is_included else name > start) and (not end or name < end)
        ]
        found = mib.following(Range(start, is_included, end))
        if inside:
            assert (found.name, found.value) == (inside[0], mib.get(inside[0]).value)
        else:
            assert (found.name, found.value.tag) == (start, master.END)


def bulk(ranges: tuple[Range, ...], singles: int, repetitions: int) -> Request:
    """Return a GET_BULK."""
    return Request(Header(PduType.GET_BULK, 0, 0, 0, 0, 0), b"", ranges, singles, repetitions)


def test_a_bulk_request_repeats_only_what_it_should() -> None:
    """The first ranges are answered once, each other one in turns, until all are exhausted."""
    mib = Mib(SOFTWARE, "1.0", ROWS)
    names = walk(mib)
    number = (*REGION, 1, 2)
    columns = ((*ENTRY, 2), (*ENTRY, 15))
    ranges = tuple(Range(start, False, ()) for start in (number, *columns))
    found = mib.answer(bulk(ranges, 1, 3))
    expected = [(*number, 0), *((*column, of) for of in (1, 3, 5) for column in columns)]
    assert [binding.name for binding in found] == expected
    everything = mib.answer(bulk((Range(REGION, False, ()),), 0, 65535))
    assert [binding.name for binding in everything[:-1]] == names
    assert everything[-1].value.tag == master.END


def test_a_bulk_request_is_never_answered_without_bound() -> None:
    """A response has a bounded number of variables, however many are requested."""
    many = [row(number, f"vm{number}", State.STOPPED) for number in range(1, 1000)]
    ranges = (Range((*ENTRY, 2), False, ()), Range((*ENTRY, 3), False, ()))
    assert len(Mib(SOFTWARE, "1.0", many).answer(bulk(ranges, 0, 65535))) == BINDINGS_MAX


# The process


class Rig:
    """The process's work, its parent, and a master agent."""

    def __init__(self, loop: EventLoop, retry_s: float = RETRY) -> None:
        self.loop = loop
        self.parent: Far[ParentToAgentx, AgentxToParent] = Far(loop, PARENT_AND_AGENTX)
        self.channel: Channel[AgentxToParent, ParentToAgentx] = Channel(
            self.parent.near, AGENTX_AND_PARENT
        )
        self.agentx = Agentx(loop, self.channel, "1.0", retry_s)
        self.channel.watch(loop, self.agentx.take, lambda _: None)
        self.master = socket.socket()
        self.received: list[master.Unit] = []
        self._rest = b""
        self.connections = 0
        self.has_left = False

    def close(self) -> None:
        """Close all."""
        self.agentx.close()
        self.channel.close()
        self.parent.close()
        self.master.close()

    def configure(self, path: str = "/agentx", context: str = "") -> None:
        """Send the master's path."""
        self.parent.say(SetSession(path=path, context=context))

    def connect(self) -> None:
        """Wait for the request for a connection, and send one."""
        self.connections += 1
        self.parent.wait(Connect, self.connections)
        self.master.close()
        self.master, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.master.setblocking(False)
        self._rest, self.received = b"", []
        self.parent.say(Connected(), (theirs.detach(),))

    def _look(self) -> None:
        try:
            data = self.master.recv(1 << 16)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        self.has_left = not data
        units, self._rest = master.parse_units(self._rest + data)
        self.received += units

    def hear(self, count: int = 1) -> master.Unit:
        """Wait for `count` PDUs in all; returns the last."""

        def is_there() -> bool:
            self._look()
            return len(self.received) >= count

        run_until(self.loop, is_there)
        return self.received[count - 1]

    def open(self, context: str = "") -> None:
        """Open the first session."""
        self.configure(context=context)
        self.reopen()

    def reopen(self) -> None:
        """Open a session again."""
        self.has_left = False
        self.connect()
        first = self.hear()
        assert first.type == master.OPEN
        self.say(master.RESPONSE, bytes(8), packet=first.packet)
        second = self.hear(2)
        assert second.type == master.REGISTER
        self.say(master.RESPONSE, bytes(8), packet=second.packet)

    def say(self, kind: int, payload: bytes, *, packet: int = 1, flags: int = 0) -> None:
        """Send a PDU of the session."""
        self.master.send(master.unit(kind, payload, session=SESSION, packet=packet, flags=flags))

    def send(self, data: bytes) -> None:
        """Send any bytes, if the process is still connected."""
        with suppress(ConnectionError):
            self.master.send(data)

    def leave(self) -> None:
        """Close the connection."""
        self.master.close()
        self.has_left = True

    def turn(self) -> None:
        """Let all sides do their pending work, and receive the results."""
        for _ in range(4):
            self.loop.call_soon(self.loop.stop)
            self.loop.run()
        if not self.has_left:
            self._look()

    def ask(self, kind: int, payload: bytes, *, packet: int = 9) -> tuple[int, list[object]]:
        """Send a request, send the rows if they are wanted, and return error and variables."""
        count, asked = len(self.received), len(self.parent.of(AskVms))
        self.say(kind, payload, packet=packet)
        self.parent.wait(AskVms, asked + 1)
        self.parent.say(VmTable(rows=ROWS[:1], has_more=True))
        self.parent.say(VmTable(rows=ROWS[1:], has_more=False))
        answer = self.hear(count + 1)
        assert (answer.type, answer.session, answer.transaction) == (master.RESPONSE, SESSION, 7)
        assert answer.packet == packet
        error, found = master.read_response(answer.payload)
        return error, list(found)


def has_ended(connection: socket.socket) -> bool:
    """Tell whether the other end is closed; reads available bytes."""
    try:
        return connection.recv(1 << 16) == b""
    except BlockingIOError:
        return False


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Return a process's work without any messages yet."""
    with EventLoop() as loop:
        rig = Rig(loop)
        try:
            yield rig
        finally:
            rig.close()


def test_it_opens_a_session_and_registers_the_region(rig: Rig) -> None:
    """The session's name is vmd, the region is the VM-MIB's, with a context if there is one."""
    rig.open(context="inside")
    first, second = rig.received
    assert first.payload == struct.pack(">B3x", 5) + master.oid(()) + master.octets(b"vmd")
    assert second.session == SESSION
    assert second.flags & master.CONTEXT
    assert second.payload.startswith(master.octets(b"inside"))
    name, rest = master.read_oid(second.payload[len(master.octets(b"inside")) + 4 :])
    assert (name, rest) == (REGION, b"")


def test_it_answers_get_next_and_bulk(rig: Rig) -> None:
    """GET, GETNEXT and GETBULK are answered, for missing names, and past the end."""
    rig.open()
    unknown = (*ENTRY, 2, 99)
    get = b"".join(master.oid(name) + master.oid(()) for name in ((*ENTRY, 2, 3), unknown, (1, 2)))
    assert rig.ask(master.GET, get) == (
        0,
        [
            ((*ENTRY, 2, 3), master.OCTETS, b"web"),
            (unknown, master.NO_INSTANCE, None),
            ((1, 2), master.NO_OBJECT, None),
        ],
    )
    following = master.oid((*ENTRY, 2, 3)) + master.oid((*ENTRY, 3))
    assert rig.ask(master.GET_NEXT, following)[1] == [((*ENTRY, 2, 5), master.OCTETS, b"bye")]
    itself = master.oid((*ENTRY, 2, 3), is_included=True) + master.oid((*ENTRY, 3))
    assert rig.ask(master.GET_NEXT, itself)[1] == [((*ENTRY, 2, 3), master.OCTETS, b"web")]
    last = master.oid((*ENTRY, 2, 12)) + master.oid((*ENTRY, 3))
    assert rig.ask(master.GET_NEXT, last)[1] == [((*ENTRY, 2, 12), master.END, None)]
    many = struct.pack(">HH", 0, 2) + master.oid((*ENTRY, 5)) + master.oid(())
    assert rig.ask(master.GET_BULK, many)[1] == [
        ((*ENTRY, 5, 1), master.INTEGER, 3),
        ((*ENTRY, 5, 3), master.INTEGER, 1),
    ]


def test_nothing_can_be_set(rig: Rig) -> None:
    """A TestSet is refused as not writable, and the session continues."""
    rig.open()
    rig.say(master.TEST_SET, b"")
    assert master.read_response(rig.hear(3).payload)[0] == 17
    get = master.oid((*REGION, 1, 2, 0)) + master.oid(())
    assert rig.ask(master.GET, get)[1] == [((*REGION, 1, 2, 0), master.INTEGER, 4)]


def test_another_context_or_session_is_refused(rig: Rig) -> None:
    """Another context or session has an error of its own, without a request to the parent."""
    rig.open()
    get = master.oid((*REGION, 1, 2, 0)) + master.oid(())
    rig.say(master.GET, master.octets(b"other") + get, flags=master.CONTEXT)
    assert master.read_response(rig.hear(3).payload)[0] == 262
    rig.master.send(master.unit(master.GET, get, session=SESSION + 1))
    assert master.read_response(rig.hear(4).payload)[0] == 257
    assert rig.parent.of(AskVms) == []


def test_one_request_is_answered_at_a_time(rig: Rig) -> None:
    """Of a thousand requests at once, one is with the parent; each is answered, in order."""
    rig.open()
    get = master.oid((*REGION, 1, 2, 0)) + master.oid(())
    units = [master.unit(master.GET, get, session=SESSION, packet=at) for at in range(1000)]
    rig.master.setblocking(True)
    rig.master.sendall(b"".join(units))
    rig.master.setblocking(False)
    for at in range(1000):
        rig.parent.wait(AskVms, at + 1)
        assert len(rig.parent.of(AskVms)) == at + 1
        rig.parent.say(VmTable(rows=ROWS, has_more=False))
        rig.hear(at + 3)
    assert [answer.packet for answer in rig.received[2:]] == list(range(1000))


def test_it_comes_back_when_the_master_does(rig: Rig) -> None:
    """After a master's end or refusal, or without one, the process tries again after a while."""
    rig.open()
    began = rig.loop.monotonic_ns()
    rig.master.close()
    rig.connect()
    assert rig.loop.monotonic_ns() - began >= RETRY * NANOSECONDS
    first = rig.hear()
    rig.say(master.RESPONSE, struct.pack(">IHH", 0, 256, 0), packet=first.packet)  # openFailed
    rig.parent.wait(Connect, 3)
    rig.parent.say(NotConnected(message="No such file or directory"))
    rig.parent.wait(Connect, 4)


def test_an_interval_is_what_openbsd_has() -> None:
    """Attempts are three seconds apart."""
    assert RETRY_S == 3


def test_another_configuration_makes_another_session(rig: Rig) -> None:
    """The old session is closed properly; without a path there is no new one."""
    rig.open()
    rig.configure(path="/other")
    closed = rig.hear(3)
    assert (closed.type, closed.session, closed.payload[0]) == (master.CLOSE, SESSION, 5)
    rig.connect()
    rig.hear()
    rig.configure(path="")
    run_until(rig.loop, lambda: has_ended(rig.master))
    assert len(rig.parent.of(Connect)) == 2


@pytest.mark.parametrize("seed", range(4))
def test_broken_units_are_read_or_refused(seed: int) -> None:
    """A broken PDU is decoded or refused, and a refusal is one line."""
    rng = random.Random(seed)
    get = master.unit(
        master.GET_NEXT, master.oid(REGION) + master.oid((*REGION, 9)), session=SESSION
    )
    refused = []
    for _ in range(5000):
        data = bytearray(get)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        try:
            header = parse_header(data)
            parse(header, bytes(data[20 : 20 + header.payload_size]))
        except PduError as err:
            refused.append(str(err))
    assert 0 < len(refused) < 5000
    assert not [text for text in refused if len(text.splitlines()) != 1]


def test_a_hostile_master_gets_nowhere(rig: Rig) -> None:
    """After each invalid PDU, the process asks for a new connection, after its delay."""
    rig.open()
    rig.master.send(b"\x02" * 64)  # another version
    rig.connect()
    rig.hear()
    rig.master.send(struct.pack(">BBBB4I", 1, master.GET, 0x10, 0, 0, 0, 0, 1 << 30))
    rig.connect()
    assert rig.hear().type == master.OPEN
