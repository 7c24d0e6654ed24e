"""Processes that vmm has the zygote fork, and some that wait ready: vmm's side.

A process is blank until it is told what it is to be. While nothing starts, one of each kind that
most VMs need is made ready: confined, and rehearsed. It knows no VM, and has no descriptor of one.
"""

import os
import socket
from collections.abc import Collection
from typing import NamedTuple

from vmd.wire.channel import Channel, ChannelError, PeerHangsError
from vmd.wire.internal import (
    EndProcess,
    Fork,
    Forked,
    ForkFailed,
    Role,
    SetVerbosity,
    VmmToZygote,
    ZygoteToVmm,
)
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop

log = Log(__name__)

SPARE_DELAY_NS = 1_000_000_000
"""How long nothing has to start until processes are made ready: guests that boot need the
processors more."""


ZYGOTE_PATIENCE_S = 60.0
"""How long the zygote may take to fork; it begins with a rehearsal, which is bounded itself."""


class ForkError(Exception):
    """There is no process; the message is one line."""


class Blank(NamedTuple):
    """A process that waits to be told what it is to be; whoever holds this owns the connection."""

    pid: int
    connection: socket.socket


class Blanks:
    """Blank processes, for the event loop's thread."""

    def __init__(
        self,
        loop: EventLoop,
        zygote: Channel[VmmToZygote, ZygoteToVmm],
        ready: Collection[Role],
        *,
        patience_s: float = ZYGOTE_PATIENCE_S,
    ) -> None:
        """Have `zygote` fork them, one of each of `ready` ahead; takes over the channel.

        A zygote that neither reads nor answers for `patience_s` stops `loop`: without one, no VM
        can be started or killed, so vmm ends and makes room for another.
        """
        self._patience_s = patience_s
        self._loop = loop
        self._zygote = zygote
        self._ready = ready
        self._spares: dict[Role, Blank] = {}
        self._timer = loop.timer(self._make_spares)
        self._plan_spares()

    def close(self) -> None:
        """Let the zygote end, and those that wait ready; vmm reaps them, or its heir does."""
        self._timer.cancel()
        for spare in self._spares.values():
            spare.connection.close()
        self._spares.clear()
        self._zygote.close()

    def take(self, role: Role) -> Blank:
        """Return a process that is to be `role`: the one that is ready, or a new one.

        Raises:
            ForkError: the host has no processes or descriptors left, or the zygote is gone.
        """
        spare = self._spares.pop(role, None) or self._fork(role, rehearses=False)
        self._plan_spares()
        return spare

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

    def ended(self, pid: int) -> Role | None:
        """Take note that a child of vmm has ended; returns what it was ready to be, if anything."""
        for role, spare in self._spares.items():
            if spare.pid == pid:
                spare.connection.close()
                del self._spares[role]
                return role
        return None

    def _plan_spares(self) -> None:
        if any(role not in self._spares for role in self._ready):
            self._timer.arm(self._loop.monotonic_ns() + SPARE_DELAY_NS)

    def _make_spares(self) -> None:
        for role in self._ready:
            if role in self._spares:
                continue
            try:
                self._spares[role] = self._fork(role, rehearses=True)
            except ForkError as err:
                log.debug("no %s process ready: %s", role, err)

    def _fork(self, role: Role, *, rehearses: bool) -> Blank:
        try:
            here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as err:
            raise ForkError(err.strerror or str(err)) from err
        try:
            self._send(Fork(role=role, rehearses=rehearses), there.detach())
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

    def _send(self, message: VmmToZygote, *fds: int) -> None:
        self._zygote.send(message, fds)
        try:
            self._zygote.send_all(self._patience_s)
        except PeerHangsError as err:
            self._give_up(err)
            raise

    def _answer(self) -> ZygoteToVmm:
        try:
            answer = self._zygote.wait(self._patience_s)
        except PeerHangsError as err:
            self._give_up(err)
            raise
        answer.fds.close()
        return answer.message

    def _give_up(self, err: PeerHangsError) -> None:
        """End vmm: what the zygote answers from now on would be taken for another answer."""
        log.error("the zygote %s: no VM can be started or killed: vmm ends", err)
        self._zygote.close()
        self._loop.stop()
