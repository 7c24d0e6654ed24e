"""Answers that no command expects: each is one line, and none is taken for success."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmctl.client import SHAPES, CommandError, RefusedError, _understood, fits
from vmctl.line.cli import main
from vmd.wire.messages import (
    AnyAnswer,
    ConsoleOpened,
    Done,
    ErrorCode,
    Event,
    EventKind,
    Failed,
    ForwardInfo,
    InterfaceInfo,
    Lines,
    LogLine,
    SourceIs,
    Started,
    State,
    Terminated,
    Totals,
    VmInfo,
    Vms,
)
from vmd.wire.parts import Statistics
from vmd.wire.ports import Connected
from vmd.wire.transfers import Cloned, ClonedVm, SnapshotInfo, SnapshotList, SnapshotOpened

UNEXPECTED = "unexpected response received from vmd"
VM = VmInfo(
    id=1,
    name="web",
    state=State.RUNNING,
    cpus=1,
    memory=1 << 30,
    statistics=Statistics(),
    interfaces=(
        InterfaceInfo(
            lladdr="fe:e1:bb:d1:00:01",
            host_addresses=("10.0.0.1/31",),
            forwards=(ForwardInfo(protocol="tcp", port=1, to_port=2),),
        ),
    ),
)
ANSWERS: tuple[AnyAnswer, ...] = (
    Done(id=1),
    Failed(code=ErrorCode.EPERM, message="no"),
    Started(id=1, pid=2, tty="/dev/pts/1"),
    Cloned(vms=(ClonedVm(name="web1", id=8, pid=800, tty="/dev/pts/8"),)),
    Terminated(id=1),
    ConsoleOpened(id=1, tty="/dev/pts/1"),
    Connected(id=1),
    Vms(vms=(VM,)),
    SnapshotList(snapshots=(SnapshotInfo(name="one", created_at=1e9, size=4096),)),
    SnapshotOpened(),
    Lines(lines=(LogLine(at=1e9, text="started"),), position=1),
    SourceIs(path="/etc/vm.conf"),
    Totals(
        starts=1,
        failed_starts=0,
        start_seconds=0.5,
        start_bounds=(0.1, 1.0),
        start_counts=(0, 1, 0),
    ),
    Event(kind=EventKind.STARTED, id=1, name="web", at=1e9),
)
COMMANDS = (
    *("status", "show web", "stop web", "stop -fw web", "stop -a", "pause web", "unpause web"),
    *("start web", "wait web", "wait --timeout 9 web", "wait --for running web"),
    *("wait --for console=x web", "console web", "load /x", "reload", "reset", "log brief"),
    *("list", "log -f web", "log --json web", "snapshot -l", "snapshot -r one", "snapshot web one"),
    "clone web web2",
    *("events", "top -n 1 -d 0.1", "metrics"),
)
ODD = (
    b"garbage",
    b"[]",
    b"null",
    b"7",
    b"{}",
    b'"done"',
    b'{"type":"done"}',
    b'{"type":"done","id":"x"}',
    b'{"type":"done","id":true}',
    b'{"type":"done","id":1e400}',
    b'{"type":"failed"}',
    b'{"type":"failed","code":7,"message":""}',
    b'{"type":"failed","code":"errorcode","message":[]}',
    b'{"type":["done"],"id":1}',
    b'{"type":"greetings","id":1}',
    b'{"type":"started","id":1,"pid":2}',
    b'{"type":"vms","vms":[{}],"has_more":false}',
    b'{"type":"vms","vms":7,"has_more":false}',
    b'{"type":"event","kind":"started","id":1,"name":"x","at":1e300,"message":""}',
    b"\xff\xfe",
    b'{"type":"done","id":' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"type":"done","id":1}' + b" " * (256 << 10),
)


class Daemon:
    """Answers every request with the same bytes."""

    def __init__(self, path: Path) -> None:
        self.data = b""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                while connection.recv(65536):
                    connection.send(self.data)

    def close(self) -> None:
        """End the daemon."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """A daemon at the commands' socket."""
    path = tmp_path / "vmd.sock"
    monkeypatch.setenv("VMD_SOCKET", str(path))
    found = Daemon(path)
    yield found
    found.close()


def wrong_ones(command: str) -> tuple[bytes, ...]:
    """Return well-formed answers that do not belong to this command."""
    expected = {
        "status": "vms",
        "list": "vms",
        "show": "vms",
        "top": "vms",
        "metrics": "vms",
        "start": "started",
        "clone": "cloned",
        "wait": "terminated",
        "console": "console-opened",
    }
    kind = expected.get(command.split(maxsplit=1)[0], "done")
    if command == "snapshot -l":
        kind = "snapshot-list"
    if command.startswith(("log -f", "log --json")):
        kind = "lines"
    if command.startswith(("wait --for", "stop -fw", "stop -a", "events")):
        kind = {
            "wait --for running web": "done",
            "wait --for console=x web": "console-opened",
            "stop -fw web": "terminated",
            "stop -a": "done",
            "events": "done",
        }[command]
    kinds = {kind, "failed"} | ({"terminated"} if command == "stop web" else set())
    encoded = (msgspec.json.encode(one) for one in ANSWERS)
    return tuple(one for one in encoded if json.loads(one)["type"] not in kinds)


@pytest.mark.parametrize("command", COMMANDS)
def test_unexpected_answers(
    command: str, daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """Garbage, wrong types and other answers are one line and status 1."""
    for data in (*ODD, *wrong_ones(command)):
        daemon.data = data
        assert main(command.split()) == 1, data[:80]
        output, errors = capsys.readouterr()
        assert errors.splitlines()[-1] == f"vmctl: {UNEXPECTED}", data[:80]
        assert output == ""


def test_shapes_are_those_of_the_protocol() -> None:
    """The commands rely only on fields that the daemon sends, answer by answer."""
    told = {}
    for answer in ANSWERS:
        fields = json.loads(msgspec.json.encode(answer))
        told[fields["type"]] = fields
        assert fits(fields, SHAPES[fields["type"]])
    assert set(told) == set(SHAPES)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.sampled_from(["done", "failed", "type", "vms", "EPERM"])
        | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["type", "id", "code", "message", "vms", "has_more", "x"]), inner
            )
        ),
        max_leaves=12,
    )
)
@settings(max_examples=300)
def test_no_answer_is_a_traceback(value: object) -> None:
    """Any JSON is understood, refused, or unexpected."""
    assert _outcome(json.dumps(value).encode()) in {"understood", "refused", UNEXPECTED}


def _outcome(data: bytes) -> str:
    try:
        _understood(data, "done vms")
    except RefusedError:
        return "refused"
    except CommandError as err:
        return str(err)
    return "understood"


def test_numbers_at_the_edge(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The largest accepted numbers can be shown."""
    vm = json.loads(msgspec.json.encode(Vms(vms=(VM,))))
    for name in ("id", "memory", "memory_used", "pid", "cpus", "uid", "gid"):
        for value in ((1 << 63) - 1, 0):
            fields = {**vm, "vms": [{**vm["vms"][0], name: value}]}
            daemon.data = json.dumps(fields).encode()
            assert main(["show", "web"]) == 0
            assert capsys.readouterr().err == ""
