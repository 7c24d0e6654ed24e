"""The parent's side of the agentx process: the connection to the SNMP agent, reports of VMs."""

import socket
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import msgspec

from vmd.config.model import Agentx
from vmd.parent.peer import Peer
from vmd.wire.agentx import (
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
from vmd.wire.channel import Fds
from vmd.wire.messages import PART_MAX
from vmm_kvm.loop import EventLoop

_encoder = msgspec.msgpack.Encoder()


class Questions(NamedTuple):
    """Requests to the rest of the parent."""

    rows: Callable[[Callable[[list[VmRow]], None]], None]
    """Calls its argument once with all VMs, soon."""
    start: Callable[[], None]
    """Starts the process."""


class SnmpAgent:
    """Reports VMs to the host's SNMP agent if vm.conf says so. For one thread."""

    def __init__(self, loop: EventLoop, questions: Questions) -> None:
        """Begin without a process: one is started when a configuration wants it."""
        self._questions = questions
        self._session = SetSession(path="", context="")
        self._was_started = False
        self._is_asked = False
        self.peer: Peer[ParentToAgentx, AgentxToParent] = Peer(
            "agentx", PARENT_AND_AGENTX, loop, self._take, on_start=self._tell, on_end=self._ended
        )

    def configure(self, config: Agentx | None) -> None:
        """Be told of VMs there, or no more."""
        path, context = (config.path, config.context) if config else ("", "")
        self._session = SetSession(path=path, context=context)
        if self.peer.is_there:
            self._tell()
        elif config and not self._was_started:
            self._was_started = True
            self._questions.start()

    def _tell(self) -> None:
        self.peer.send(self._session)

    def _ended(self) -> None:
        self._is_asked = False

    def _take(self, message: AgentxToParent, _fds: Fds) -> None:
        match message:
            case Connect():
                self._connect()
            case AskVms() if not self._is_asked:  # else the answer is under way
                self._is_asked = True
                self._questions.rows(self._answer)

    def _connect(self) -> None:
        path = self._session.path
        if not path:
            self.peer.send(NotConnected(message="not configured"))
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            try:
                connection.connect(path)
            except OSError as err:
                self.peer.send(NotConnected(message=err.strerror or str(err)))
                return
            self.peer.send(Connected(), (connection.detach(),))

    def _answer(self, rows: list[VmRow]) -> None:
        self._is_asked = False
        parts = list(_parts(rows))
        for at, part in enumerate(parts, 1):
            self.peer.send(VmTable(rows=part, has_more=at < len(parts)))


def _parts(rows: Iterable[VmRow]) -> Iterator[tuple[VmRow, ...]]:
    """Yield rows in parts of one message each; at least one."""
    part: list[VmRow] = []
    size = 0
    for row in rows:
        added = len(_encoder.encode(row))
        if part and size + added > PART_MAX:
            yield tuple(part)
            part, size = [], 0
        part.append(row)
        size += added
    yield tuple(part)
