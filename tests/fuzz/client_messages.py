"""Fuzz target: requests of clients, decided by the daemon's own rules, up to the answer.

Each line of an input is a request of one of three users. An invalid one is refused in one line; for
others the parent decides, as in the daemon, and a client understands each answer.
"""

from __future__ import annotations

import msgspec

from tests.fuzz.inputs import check_line
from tests.unit.vmd.registry_host import ALICE, BOB, ROOT, Host
from vmd.config.model import VmConfig
from vmd.wire.encoding import WireError
from vmd.wire.internal import CONTROL_AND_PARENT, PARENT_AND_CONTROL, ClientAnswer, ClientRequest
from vmd.wire.messages import (
    CLIENT_TO_DAEMON,
    DAEMON_TO_CLIENT,
    AnyRequest,
    Events,
    Failed,
)

USERS = (ROOT, ALICE, BOB)
REQUESTS_MAX = 40
CONFIGS = (VmConfig(name="a", memory=1 << 28), VmConfig(name="b", memory=1 << 28))
EXAMPLES = (
    {"type": "status", "statistics": True, "interfaces": True},
    {"type": "start", "name": "a"},
    {"type": "start", "name": "new", "memory": 1 << 28, "disks": [{"path": "/d"}], "kernel": 0},
    {"type": "start", "name": "i", "instance": "a", "interfaces": [{"switch": "s"}, {}]},
    {"type": "stop", "name": "a", "force": True, "serial": 7},
    {"type": "stop", "id": 1, "wait": True},
    {"type": "wait", "name": "b"},
    {"type": "pause", "id": 1},
    {"type": "unpause", "id": 2},
    {"type": "console", "name": "a"},
    {"type": "connect", "name": "a", "port": 22},
    {"type": "debug", "name": "a"},
    {"type": "events", "serial": 3},
    {"type": "load", "path": "/etc/vm.conf"},
    {"type": "reload"},
    {"type": "reset", "mode": "vms"},
    {"type": "log", "level": 2},
    {"type": "status", "version": 2, "unknown": None},
)


def run(data: bytes) -> None:
    """Ask a daemon."""
    host = Host()
    host.run(host.registry.load(CONFIGS))
    for line in data.split(b"\n")[:REQUESTS_MAX]:
        try:
            request = DAEMON_TO_CLIENT.decode(line[1:])
        except WireError as err:
            check_line(str(err))
            continue
        _ask(host, request, USERS[line[0] % len(USERS)])
        while host.launches:
            vm = host.registry.find(host.launches[0], "")
            assert vm is not None
            host.launch(vm.name)


def _ask(host: Host, request: AnyRequest, uid: int) -> None:
    """Pass a request on as control does, and check the answer as a client would."""
    assert DAEMON_TO_CLIENT.decode(msgspec.json.encode(request)) == request
    if isinstance(request, Events):
        return
    passed = CONTROL_AND_PARENT.encode(ClientRequest(client=1, request=request))
    received = PARENT_AND_CONTROL.decode(passed)
    assert isinstance(received, ClientRequest)
    assert received.request == request
    answer = host.ask(received.request, uid)
    if answer is None:
        return
    said = CONTROL_AND_PARENT.decode(
        PARENT_AND_CONTROL.encode(ClientAnswer(client=1, answer=answer))
    )
    assert isinstance(said, ClientAnswer)
    if isinstance(answer, Failed) and answer.message:
        check_line(answer.message)
    assert CLIENT_TO_DAEMON.decode(DAEMON_TO_CLIENT.encode(said.answer)) == answer


def seeds() -> list[bytes]:
    """Return requests of each kind, alone and one after the other."""
    lines = [msgspec.json.encode(example) for example in EXAMPLES]
    found = [bytes([user]) + line for user in range(len(USERS)) for line in lines]
    return [*found, b"\n".join(found[: len(lines)]), b"\n".join(found[len(lines) :])]
