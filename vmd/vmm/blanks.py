"""Processes that vmm has the zygote fork, and some that wait ready: vmm's side.

A process is blank until it is told what it is to be. While nothing starts, one of each kind that
most VMs need is made ready: confined, and rehearsed. It knows no VM, and has no descriptor of one.
"""

import os
import socket
from collections.abc import Collection
from enum import Enum
from functools import partial
from typing import NamedTuple, assert_never

from vmd.wire.blank import BLANK_IS_COLD, BLANK_IS_READY, Preparation, Role
from vmd.wire.channel import Channel, ChannelError, PeerHangsError, Received
from vmd.wire.forking import EndProcess, Fork, Forked, ForkFailed, Serving, VmmToZygote, ZygoteToVmm
from vmd.wire.internal import SetVerbosity
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop

log = Log(__name__)

SPARE_DELAY_NS = 1_000_000_000
"""How long nothing has to start until processes are made ready: guests that boot need the
processors more."""
SPARE_PATIENCE_NS = 20 * NANOSECONDS
"""How long a process may take to be ready, on the slowest of hosts."""
ZYGOTE_PATIENCE_S = 60.0
"""How long the zygote may take to fork; it begins by warming up, which is bounded itself."""


class ForkError(Exception):
    """There is no process; the message is one line."""


class Blank(NamedTuple):
    """A process that waits to be told what it is to be; whoever holds this owns the connection."""

    pid: int
    connection: socket.socket


class Ended(Enum):
    """Which of the processes that this module looks after has ended."""

    ZYGOTE = "zygote"
    SPARE = "spare"


class _Spare(NamedTuple):
    """A process that is made ahead."""

    role: Role
    blank: Blank
    preparation: Preparation
    is_ready: bool = False


class Blanks:
    """Blank processes, for the event loop's thread."""

    def __init__(
        self,
        loop: EventLoop,
        zygote: Channel[VmmToZygote, ZygoteToVmm],
        pid: int,
        ready: Collection[Role],
        *,
        rehearses: bool,
        patience_s: float = ZYGOTE_PATIENCE_S,
    ) -> None:
        """Have `zygote`, at first process `pid`, fork them; takes over the channel.

        One of each of `ready` is made ahead, and rehearses if `rehearses`. A zygote that neither
        reads nor answers for `patience_s` stops `loop`: without one, no VM can be started or
        killed, so vmm ends and makes room for another.
        """
        self._patience_s = patience_s
        self._loop = loop
        self._zygote = zygote
        self._zygotes = {pid}
        self._serving = 0
        """The one of them that forks; 0 before it says so."""
        best = Preparation.REHEARSED if rehearses else Preparation.CONFINED
        self._preparations = dict.fromkeys(ready, best)
        """How the next one of each role is made ahead; a role that is not here has none."""
        self._spares: dict[Role, _Spare] = {}
        self._timer = loop.timer(self._make_spares)
        self._patience = loop.timer(self._give_up)
        zygote.watch(loop, self._unasked, lambda err: log.debug("the zygote: %s", err))
        self._plan_spares()

    def close(self) -> None:
        """Let the zygote end, and those that wait ready; vmm reaps them, or its heir does."""
        self._timer.cancel()
        self._patience.cancel()
        for spare in tuple(self._spares.values()):
            self._forget(spare)
        self._zygote.close()

    def take(self, role: Role) -> Blank:
        """Return a process that is to be `role`: the one that is ready, or a new one.

        Raises:
            ForkError: the host has no processes or descriptors left, or the zygote is gone.
        """
        spare = self._spares.get(role)
        if spare is not None and not spare.is_ready:
            self._said(spare)
            spare = self._spares[role]
        if spare is None or not spare.is_ready:
            return self._fork(role, Preparation.NONE)
        del self._spares[role]
        self._plan_spares()
        return spare.blank

    def kill(self, pid: int) -> None:
        """Have a process killed that `take` has returned, and that nobody has waited for yet."""
        try:
            self._send(EndProcess(), os.pidfd_open(pid))
        except (OSError, ChannelError) as err:
            log.warning("pid %d: cannot be killed: %s", pid, err)

    def set_verbosity(self, level: int) -> None:
        """Have the zygote log more or less; what it forks is told when it begins."""
        try:
            self._send(SetVerbosity(level=level))
        except ChannelError as err:
            log.warning("the zygote: %s", err)

    def ended(self, pid: int, status: int) -> Ended | None:
        """Take note that a child of vmm has ended; returns which of ours it was, if any."""
        if pid in self._zygotes:
            # One that another takes the place of ends with 0.
            return Ended.ZYGOTE if status or pid == self._serving else None
        for spare in tuple(self._spares.values()):
            if spare.blank.pid == pid:
                self._forget(spare)
                log.warning("the %s process made ahead has ended, status %d", spare.role, status)
                self._failed(spare)
                return Ended.SPARE
        return None

    # Those that are made ahead

    def _plan_spares(self) -> None:
        if any(role not in self._spares for role in self._preparations):
            self._timer.arm(self._loop.monotonic_ns() + SPARE_DELAY_NS)

    def _make_spares(self) -> None:
        for role, preparation in self._preparations.items():
            if role in self._spares:
                continue
            try:
                blank = self._fork(role, preparation)
            except ForkError as err:
                log.debug("no %s process ready: %s", role, err)
                continue
            spare = self._spares[role] = _Spare(role, blank, preparation)
            self._loop.add_reader(blank.connection.fileno(), partial(self._said, spare))
            self._patience.arm(self._loop.monotonic_ns() + SPARE_PATIENCE_NS)

    def _said(self, spare: _Spare) -> None:
        try:
            said = spare.blank.connection.recvmsg(len(BLANK_IS_READY), 0, socket.MSG_DONTWAIT)[0]
        except BlockingIOError:
            return
        except OSError as err:  # it has ended
            log.debug("%s process: %s", spare.role, err)
            said = b""
        self._loop.remove_reader(spare.blank.connection.fileno())
        if said in {BLANK_IS_READY, BLANK_IS_COLD}:
            self._spares[spare.role] = spare._replace(is_ready=True)
        if said == BLANK_IS_COLD:
            self._preparations[spare.role] = Preparation.CONFINED

    def _give_up(self) -> None:
        """Kill those that are not ready yet."""
        for spare in tuple(self._spares.values()):
            if not spare.is_ready:
                log.warning("the %s process made ahead is not ready: killed", spare.role)
                self.kill(spare.blank.pid)
                self._forget(spare)
                self._failed(spare)

    def _forget(self, spare: _Spare) -> None:
        del self._spares[spare.role]
        self._loop.remove_reader(spare.blank.connection.fileno())
        spare.blank.connection.close()

    def _failed(self, spare: _Spare) -> None:
        """Prepare the next one less, unless the last had been ready."""
        if not spare.is_ready:
            if spare.preparation is Preparation.REHEARSED:
                self._preparations[spare.role] = Preparation.CONFINED
            else:
                self._preparations.pop(spare.role, None)
        self._plan_spares()

    # Forking

    def _fork(self, role: Role, preparation: Preparation) -> Blank:
        try:
            here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as err:
            raise ForkError(err.strerror or str(err)) from err
        try:
            self._send(Fork(role=role, preparation=preparation), there.detach())
            answer = self._answer()
        except ChannelError as err:
            here.close()
            raise ForkError(f"the zygote: {err}") from err
        match answer:
            case Forked(pid=pid):
                return Blank(pid, here)
            case ForkFailed(message=message):
                here.close()
                raise ForkError(message)
            case _:
                assert_never(answer)

    def _send(self, message: VmmToZygote, *fds: int) -> None:
        self._zygote.send(message, fds)
        try:
            self._zygote.send_all(self._patience_s)
        except PeerHangsError as err:
            self._end(err)
            raise

    def _answer(self) -> Forked | ForkFailed:
        try:
            while (answer := self._hear(self._zygote.wait(self._patience_s))) is None:
                pass
        except PeerHangsError as err:
            self._end(err)
            raise
        return answer

    def _hear(self, received: Received[ZygoteToVmm]) -> Forked | ForkFailed | None:
        """Return an answer; None if it is something else, which is taken note of."""
        received.fds.close()
        if isinstance(received.message, Serving):
            self._serving = received.message.pid
            self._zygotes.add(self._serving)
            return None
        return received.message

    def _unasked(self, received: Received[ZygoteToVmm]) -> None:
        if self._hear(received) is not None:
            log.warning("the zygote: an answer to no question")

    def _end(self, err: PeerHangsError) -> None:
        """End vmm: what the zygote answers from now on would be taken for another answer."""
        log.error("the zygote %s: no VM can be started or killed: vmm ends", err)
        self._zygote.close()
        self._loop.stop()
