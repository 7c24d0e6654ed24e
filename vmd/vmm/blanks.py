"""vmm's side of the processes that the zygote forks for it, some of them in advance.

A process is blank until it receives its task. While nothing starts, one of each kind that most VMs
need is made ready: confined, and rehearsed. It knows no VM, and has no descriptor of one. Ready
processes have one uid, the next VM's. They may also wait in its control group.

Nothing here waits for the zygote. A process can be sent its task before it exists: its end of the
connection is on the way to it.
"""

import os
import select
import socket
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from functools import partial
from itertools import count
from typing import NamedTuple, assert_never

from vmd.vmm.uid_pool import UidPool
from vmd.wire.blank import (
    BLANK_IS_COLD,
    BLANK_IS_READY,
    VMM_AND_BLANK,
    JoinCgroup,
    Preparation,
    Role,
)
from vmd.wire.channel import Channel, ChannelError, Received
from vmd.wire.forking import (
    EndProcess,
    Fork,
    Forked,
    ForkFailed,
    ProcessEnded,
    Serving,
    VmmToZygote,
    ZygoteToVmm,
)
from vmd.wire.internal import SetVerbosity
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop

log = Log(__name__)

SPARE_DELAY_NS = 1_000_000_000
"""How long no VM must have started before processes are made ready: booting guests need the
processors more."""
SPARE_PATIENCE_NS = 20 * NANOSECONDS
"""How long a process may take to be ready, on the slowest of hosts."""
ZYGOTE_PATIENCE_S = 60.0
"""How long the zygote may take for an order, besides its warming up, which has a limit of its
own."""


class ForkError(Exception):
    """There is no process; the message is one line."""


class Blank(NamedTuple):
    """A process that waits for its task; the holder owns the connection."""

    connection: socket.socket
    pid: int
    """0 if the zygote has not told of it yet."""


class Ended(Enum):
    """A process of this module has ended."""

    ZYGOTE = "zygote"
    SPARE = "spare"
    UNKNOWN = "one that the zygote has not told of yet"


Then = Callable[[int], None]
"""Called when a process exists, with its pid."""
Else = Callable[[ForkError], None]
"""Called when an order has failed."""


class _Order(NamedTuple):
    """An order that has not been answered."""

    then: Then
    otherwise: Else
    connection: socket.socket | None = None
    """The future process's end; not ours."""

    @property
    def has_died(self) -> bool:
        """Whether the process ended before it reported itself."""
        if self.connection is None or self.connection.fileno() < 0:
            return False  # unknown
        poll = select.poll()
        poll.register(self.connection, 0)  # an end is always told
        return bool(poll.poll(0))


class _Spare:
    """A process that is made ahead."""

    def __init__(
        self, role: Role, uid: int, connection: socket.socket, preparation: Preparation
    ) -> None:
        self.role = role
        self.uid = uid
        self.connection = connection
        self.preparation = preparation
        self.pid = 0
        """0 until the zygote has said it."""
        self.is_ready = False


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
        uids: Iterable[int] = (),
        patience_s: float = ZYGOTE_PATIENCE_S,
    ) -> None:
        """Have `zygote`, at first process `pid`, fork them; takes over the channel, with its pids.

        One of each of `ready` is made ahead, and rehearses if `rehearses`. Each VM has one of
        `uids`; without any, all have the zygote's. A zygote that does not answer for `patience_s`
        is abandoned: all orders fail from then on.
        """
        self._patience_ns = int(patience_s * NANOSECONDS)
        self._loop = loop
        self._zygote = zygote
        self._zygotes = {pid}
        self._serving = 0
        """The zygote process that forks; 0 before it reports itself."""
        self._first = pid
        self._uids = UidPool(uids)
        self._orders: dict[int, _Order] = {}
        self._order_numbers = count(1)
        self._failure: ForkError | None = None
        """Why no order can be carried out any more."""
        self._early: dict[int, int] = {}
        """Processes that ended before the zygote reported them: status by pid."""
        self._on_early: Callable[[int, int], None] = lambda _pid, _status: None
        self._on_abandoned: Callable[[], None] = loop.stop
        self.is_abandoned = False
        """Whether the zygote hangs, so that processes can be neither made nor killed."""
        best = Preparation.REHEARSED if rehearses else Preparation.CONFINED
        self._preparations = dict.fromkeys(ready, best)
        """How the next process of each role is made ahead; other roles have none."""
        self._spares: dict[Role, _Spare] = {}
        self._unwanted: list[socket.socket] = []
        """Connections of ready processes that are to end."""
        self._cgroup: tuple[int, tuple[int, int]] | None = None
        """The next VM's, by number, and descriptors for joining it; ours."""
        self._spare_uid: int | None = None
        """The uid of those made ahead; None if there is none."""
        self._timer = loop.timer(self._make_spares)
        self._patience = loop.timer(self._give_up)
        self._zygote_patience = loop.timer(self._zygote_hangs)
        zygote.watch(loop, self._answered, self._zygote_left)
        self._plan_spares()

    @property
    def has_orders(self) -> bool:
        """Whether the zygote owes an answer."""
        return bool(self._orders)

    def serve(self, on_early: Callable[[int, int], None], on_abandoned: Callable[[], None]) -> None:
        """Call `on_early` with pid and status of a process that ended before it was reported.

        `on_abandoned` is called when the zygote hangs.
        """
        self._on_early = on_early
        self._on_abandoned = on_abandoned

    def close(self) -> None:
        """Let the zygote and the ready processes end; vmm reaps them, or its heir does."""
        self._timer.cancel()
        self._patience.cancel()
        self._zygote_patience.cancel()
        self._release_unwanted()
        self.withdraw()
        for spare in tuple(self._spares.values()):
            self._forget(spare)
        self._zygote.close()

    # The processes of a VM

    def claim(self) -> int:
        """Return the uid of the next VM: that of the ready processes.

        Raises:
            ForkError: all uids are in use.
        """
        if self._spare_uid is not None:
            uid, self._spare_uid = self._spare_uid, None
            return uid
        taken = self._uids.take()
        if taken is None:
            raise ForkError("all uids are in use (vmd --uids)")
        return taken

    def take(self, role: Role, uid: int, then: Then, otherwise: Else) -> Blank:
        """Return a process for `role` of the VM with `uid`: a ready one, if any.

        The pid of a new one is 0; `then` is called once it exists, or `otherwise` if it never will.

        Raises:
            ForkError: the host has no descriptors left, or the zygote is gone.
        """
        spare = self._spares.get(role)
        if spare is not None and spare.uid == uid:
            if not spare.is_ready:
                self._said(spare)
            if spare.is_ready and spare.pid:
                del self._spares[role]
                self._plan_spares()
                return Blank(spare.connection, spare.pid)
        return Blank(self._fork(role, uid, Preparation.NONE, then, otherwise), 0)

    def settle(self, uid: int) -> None:
        """Release ready processes that their VM has not taken, once it has the processors less."""
        for spare in tuple(self._spares.values()):
            if spare.uid == uid and uid:
                del self._spares[spare.role]
                self._loop.remove_reader(spare.connection.fileno())
                self._unwanted.append(spare.connection)
        self._plan_spares()

    def release(self, uid: int) -> None:
        """Release the uid of a VM once the last of its processes is reaped."""
        self._uids.release(uid)

    def kill(self, pid: int, otherwise: Else) -> None:
        """Have a process of `take` killed that has not been reaped yet."""
        number = next(self._order_numbers)
        message = EndProcess(order=number, uid=self._uids.uid_of(pid))
        try:
            order = _Order(lambda _pid: None, otherwise)
            self._order(number, order, message, os.pidfd_open(pid))
        except ForkError as err:
            otherwise(err)
        except OSError as err:
            otherwise(ForkError(err.strerror or str(err)))

    def set_verbosity(self, level: int) -> None:
        """Set the verbosity of the zygote; its forks get it when they begin."""
        try:
            self._zygote.send(SetVerbosity(level=level))
        except ChannelError as err:
            log.warning("the zygote: %s", err)

    def knows(self, pid: int) -> bool:
        """Tell whether a process is the zygote, or one that it has told of."""
        return pid in self._zygotes or pid in self._uids

    def ended(self, pid: int, status: int) -> Ended | None:
        """Note that a child of vmm has ended; returns which of ours it was, if any."""
        if pid in self._zygotes:
            # The one that is replaced ends with 0.
            return Ended.ZYGOTE if status or pid == self._serving else None
        if pid not in self._uids:
            if self.has_orders:
                self._early[pid] = status
            return Ended.UNKNOWN
        self._uids.ended(pid)
        for spare in tuple(self._spares.values()):
            if spare.pid == pid:
                self._forget(spare)
                log.warning("the %s process made ahead has ended, status %d", spare.role, status)
                self._failed(spare)
                return Ended.SPARE
        return None

    def expect_clones(self, are_expected: bool) -> None:
        """Prepare the next processes for clones, or for other VMs."""
        rehearsed = {Preparation.REHEARSED, Preparation.CLONE}
        if self._preparations.get(Role.VM) in rehearsed:
            best = Preparation.CLONE if are_expected else Preparation.REHEARSED
            self._preparations[Role.VM] = best

    # Those that are made ahead

    def offer(self, number: int, fds: tuple[int, int]) -> None:
        """Have ready processes join a control group, until it is withdrawn or another one offered.

        Takes over `fds`, for joining as a VM's process and as a device's.
        """
        self.withdraw()
        self._cgroup = number, fds
        for spare in self._spares.values():
            self._join(spare)

    def withdraw(self, number: int | None = None) -> None:
        """Have no more processes join this control group, or any."""
        if self._cgroup and number in {None, self._cgroup[0]}:
            for fd in self._cgroup[1]:
                os.close(fd)
            self._cgroup = None

    def _join(self, spare: _Spare) -> None:
        if not spare.is_ready or not self._cgroup:
            return
        number, (guest, devices) = self._cgroup
        data = VMM_AND_BLANK.encode(JoinCgroup(number=number))
        fd = guest if spare.role is Role.VM else devices
        try:
            socket.send_fds(spare.connection, [data], [fd], socket.MSG_DONTWAIT)
        except OSError as err:  # it has ended; or it joins when it has a task
            log.debug("%s process: %s", spare.role, err)

    def _plan_spares(self) -> None:
        if self._unwanted or any(role not in self._spares for role in self._preparations):
            self._timer.arm(self._loop.monotonic_ns() + SPARE_DELAY_NS)

    def _make_spares(self) -> None:
        self._release_unwanted()
        for role, preparation in self._preparations.items():
            if role in self._spares:
                continue
            try:
                self._make_spare(role, preparation)
            except ForkError as err:
                log.debug("no %s process ready: %s", role, err)

    def _release_unwanted(self) -> None:
        while self._unwanted:
            self._unwanted.pop().close()

    def _make_spare(self, role: Role, preparation: Preparation) -> None:
        if self._spare_uid is None:
            self._spare_uid = self.claim()
        uid = self._spare_uid
        made: list[_Spare] = []

        def then(pid: int) -> None:
            made[0].pid = pid
            self._patience.arm(self._loop.monotonic_ns() + SPARE_PATIENCE_NS)
            if self._spares.get(role) is made[0]:
                self._said(made[0])

        def otherwise(err: ForkError) -> None:
            log.debug("no %s process ready: %s", role, err)
            if self._spares.get(role) is made[0]:
                self._forget(made[0])

        connection = self._fork(role, uid, preparation, then, otherwise)
        made.append(_Spare(role, uid, connection, preparation))
        self._spares[role] = made[0]
        self._loop.add_reader(connection.fileno(), partial(self._said, made[0]))

    def _said(self, spare: _Spare) -> None:
        try:
            said = spare.connection.recvmsg(len(BLANK_IS_READY), 0, socket.MSG_DONTWAIT)[0]
        except BlockingIOError:
            return
        except OSError as err:  # it has ended
            log.debug("%s process: %s", spare.role, err)
            said = b""
        self._loop.remove_reader(spare.connection.fileno())
        if said in {BLANK_IS_READY, BLANK_IS_COLD}:
            spare.is_ready = True
            self._join(spare)
        if said == BLANK_IS_COLD:
            self._preparations[spare.role] = Preparation.CONFINED

    def _give_up(self) -> None:
        """Kill those that are not ready yet."""
        for spare in tuple(self._spares.values()):
            if not spare.is_ready and spare.pid:
                log.warning("the %s process made ahead is not ready: killed", spare.role)
                self.kill(spare.pid, lambda err: log.warning("cannot be killed: %s", err))
                self._forget(spare)
                self._failed(spare)

    def _forget(self, spare: _Spare) -> None:
        del self._spares[spare.role]
        self._loop.remove_reader(spare.connection.fileno())
        spare.connection.close()

    def _failed(self, spare: _Spare) -> None:
        """Prepare the next one less if the last was not ready in time."""
        if not spare.is_ready:
            if spare.preparation is not Preparation.CONFINED:
                self._preparations[spare.role] = Preparation.CONFINED
            else:
                self._preparations.pop(spare.role, None)
        self._plan_spares()

    # Orders

    def _fork(
        self, role: Role, uid: int, preparation: Preparation, then: Then, otherwise: Else
    ) -> socket.socket:
        try:
            here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as err:
            raise ForkError(err.strerror or str(err)) from err

        def forked(pid: int) -> None:
            self._uids.started(pid, uid)
            then(pid)
            if pid in self._early:
                self._on_early(pid, self._early.pop(pid))

        number = next(self._order_numbers)
        message = Fork(order=number, role=role, preparation=preparation, uid=uid)
        try:
            self._order(number, _Order(forked, otherwise, here), message, there.detach())
        except ForkError:
            here.close()
            raise
        return here

    def _order(self, number: int, order: _Order, message: VmmToZygote, fd: int) -> None:
        try:
            self._zygote.send(message, [fd])
        except ChannelError as err:
            raise self._failure or ForkError(f"the zygote: {err}") from err
        if not self._orders:
            self._wait_for_answers()
        self._orders[number] = order

    def _wait_for_answers(self) -> None:
        self._zygote_patience.arm(self._loop.monotonic_ns() + self._patience_ns)

    def _answered(self, received: Received[ZygoteToVmm]) -> None:
        received.fds.close()
        answer = received.message
        if isinstance(answer, Serving):
            # The first may report itself before any was ordered.
            self._serving = self._zygote.sender_pid or self._first
            self._zygotes.add(self._serving)
            return
        order = self._orders.pop(answer.order, None)
        if order is None:
            log.warning("the zygote: an answer to no question")
            return
        self._zygote_patience.cancel()
        if self._orders:
            self._wait_for_answers()
        match answer:
            case Forked():
                order.then(self._zygote.sender_pid)
            case ProcessEnded():
                order.then(0)
            case ForkFailed(message=message):
                order.otherwise(ForkError(message))
            case _:
                assert_never(answer)
        if not self._orders:
            self._early.clear()

    def _zygote_left(self, err: ChannelError) -> None:
        self._fail(ForkError(f"the zygote: {err}"))

    def _zygote_hangs(self) -> None:
        dead = [number for number, order in self._orders.items() if order.has_died]
        for number in dead:
            self._orders.pop(number).otherwise(ForkError("its process has ended"))
        if dead:
            if self._orders:
                self._wait_for_answers()
            return
        seconds = self._patience_ns / NANOSECONDS
        failure = ForkError(f"the zygote has not answered for {seconds:g} s")
        log.error("%s: no VM can be started until those that run have ended", failure)
        self.is_abandoned = True
        self._fail(failure)
        self._on_abandoned()

    def _fail(self, failure: ForkError) -> None:
        """Fail all orders: later answers of the zygote could be taken for others'."""
        self._failure = failure
        self._zygote.close()
        self._timer.cancel()
        self._zygote_patience.cancel()
        self._release_unwanted()
        for spare in tuple(self._spares.values()):
            self._forget(spare)
        self._preparations.clear()
        orders = tuple(self._orders.values())
        self._orders.clear()
        for order in orders:
            order.otherwise(failure)
