"""Fuzz target: answers of a hostile guest's agent to any request.

The client ends with a result, or with an error of one line; its buffers are bounded.
"""

from __future__ import annotations

import itertools
import json
import socket

from tests.fuzz.inputs import Input, check_line
from vmctl.client import CommandError
from vmctl.guest.agent import Agent, Session
from vmctl.guest.frames import SIZE_BODY, TAKEN_BODY, WINDOW, Kind, frame

_DATA_MAX = 60 << 10
"""Bytes that a socket takes while its other side does not read."""
_OUTPUTS = (Kind.OUTPUT, Kind.ERRORS)


def run(data: bytes) -> None:
    """Answer with these bytes; the first chooses how much the client sends, takes and resizes."""
    given = Input(data)
    how = given.number(1)
    theirs, ours = socket.socketpair()
    with theirs:
        theirs.sendall(given.piece(_DATA_MAX))
        theirs.shutdown(socket.SHUT_WR)
        agent = Agent(lambda: ours)
        try:
            with agent.open("exec") as session:
                _talk(session, how)
        except CommandError as err:
            check_line(str(err))


def _talk(session: Session, how: int) -> None:
    if how & 1:
        session.resize(*SIZE_BODY.unpack(b"\0\x18\0\x50"))
    while session.result is None:
        if how & 2 and session.room:
            session.feed(bytes(min(session.room, 1000)))
        if how & 4:
            for channel in _OUTPUTS:
                session.take(channel)
        session.wait()
        assert 0 <= session.room <= WINDOW
        assert all(session.arrived(channel) <= WINDOW for channel in _OUTPUTS)
    assert set(session.result) != {"status"} or 0 <= session.result["status"] <= 255


def _object(kind: Kind, **fields: object) -> bytes:
    return frame(kind, json.dumps(fields).encode())


def seeds() -> list[bytes]:
    """Return whole conversations, and some that break a rule."""
    hello = _object(Kind.HELLO, protocol=1, version="1.0")
    started = _object(Kind.STARTED, pid=7)
    output = frame(Kind.OUTPUT, b"one") + frame(Kind.ERRORS, b"two") + frame(Kind.OUTPUT)
    taken = frame(Kind.TAKEN, TAKEN_BODY.pack(Kind.INPUT, 1000))
    ends = (
        _object(Kind.EXIT, status=3),
        _object(Kind.EXIT, signal=9),
        _object(Kind.EXIT, status=256),
        _object(Kind.EXIT, status=True),
        _object(Kind.DONE),
        _object(Kind.FAILED, code="user", message="\x1b]0;x\x07\nline"),
        _object(Kind.FAILED, code=1, message=None),
        taken,
        taken * 300,
        frame(Kind.TAKEN, TAKEN_BODY.pack(Kind.OUTPUT, 1)),
        frame(Kind.INPUT, b"mine"),
        b"\x63\0\0\0\0",
        bytes((Kind.OUTPUT,)) + b"\xff\xff\xff\xff",
        frame(Kind.OUTPUT, bytes(50 << 10)),
        frame(Kind.EXIT, b"[" * 20000),
        frame(Kind.EXIT, b"\xff"),
    )
    found = [hello + started + output + end for end in ends]
    found += [hello + ends[5], hello + hello, started, hello + started + started, hello + output]
    found += [_object(Kind.HELLO, protocol=2, version="2"), _object(Kind.HELLO, protocol=[]), b""]
    return [bytes([how]) + one for how, one in zip(itertools.cycle((6, 7, 0, 3)), found)]
