"""The zygote: it only forks the processes that vmm asks for.

A fork shares every page of memory until one side writes to it, and an interpreter writes to nearly
every object that it uses. So before the zygote serves, it imports all modules that its children may
import and runs their code; afterwards it only forks. vmm does not fork itself because it is busy
whenever VMs start, and its writes would unshare pages with each child.

What is forked is a child of vmm from its birth (`siblings`): the kernel tells vmm when it ends, and
vmm can have it killed safely, without hitting a later process with its pid. Where root has started
the daemon, the zygote and its children have a pid namespace: no other process has a number there.
They do not know their numbers outside; the kernel tells vmm which process sent `Forked`.
"""

import os
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import NamedTuple, NoReturn, assert_never

from vmd.confine.sandbox import acting_as, become
from vmd.shared import log as logging
from vmd.shared.privsep import live
from vmd.shared.siblings import fork_sibling
from vmd.wire.blank import BLANK_IS_COLD, BLANK_IS_READY, Preparation, Role
from vmd.wire.channel import Channel, ChannelError, Fds
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
from vmm_kvm.log import Log

log = Log(__name__)

_PATIENCE_S = 60.0


class Body(NamedTuple):
    """A process's work."""

    prepare: Callable[[Preparation], str | None]
    """Confines it, and rehearses if that is asked for; returns why it cannot."""
    run: Callable[[socket.socket], int]
    """Takes over its connection to vmm; returns the exit status."""
    fds: tuple[int, ...] = ()
    """Descriptors that it has."""


def serve(vmm: Channel[ZygoteToVmm, VmmToZygote], bodies: Mapping[Role, Body]) -> None:
    """Fork what `vmm` asks for until it is gone."""
    try:
        _say(vmm, Serving())
        while True:
            order, fds, _size = vmm.wait()
            with fds:
                if isinstance(order, SetVerbosity):
                    logging.set_verbosity(order.level)
                else:
                    _obey(vmm, order, fds, bodies)
    except ChannelError as err:
        log.debug("vmm: %s", err)


def _obey(
    vmm: Channel[ZygoteToVmm, VmmToZygote],
    order: Fork | EndProcess,
    fds: Fds,
    bodies: Mapping[Role, Body],
) -> None:
    try:
        fd = fds.take(0)
    except ChannelError as err:
        log.warning("%s: %s", type(order).__name__, err)
        if isinstance(order, Fork):
            _say(vmm, ForkFailed(order=order.order, message=str(err)))
        else:
            _say(vmm, ProcessEnded(order=order.order))
        return
    match order:
        case Fork(role=role):
            with socket.socket(fileno=fd) as connection:
                _fork(vmm, order, bodies[role], connection)
        case EndProcess(uid=uid):
            _kill(fd, uid)
            _say(vmm, ProcessEnded(order=order.order))
        case _:
            assert_never(order)


def _say(vmm: Channel[ZygoteToVmm, VmmToZygote], message: ZygoteToVmm) -> None:
    vmm.send(message)
    vmm.send_all(_PATIENCE_S)  # no message may be buffered here: a forked child would send it again


def _kill(pidfd: int, uid: int) -> None:
    # Landlock lets a process signal only those within its own domain: ours, but not vmm's, has
    # these.
    try:
        with acting_as(uid) if uid else nullcontext():
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        log.debug("what was to be killed has ended")
    except PermissionError as err:
        log.warning("uid %d: cannot be killed: %s", uid, err.strerror)
    finally:
        os.close(pidfd)


def _fork(
    vmm: Channel[ZygoteToVmm, VmmToZygote], order: Fork, body: Body, connection: socket.socket
) -> None:
    try:
        pid = fork_sibling()
    except OSError as err:
        _say(vmm, ForkFailed(order=order.order, message=err.strerror or str(err)))
        return
    if pid == 0:
        try:
            _say(vmm, Forked(order=order.order))
        except BaseException:  # noqa: BLE001 - it must never be another zygote
            os._exit(1)
        begin(order, body, connection)


def begin(order: Fork, body: Body, connection: socket.socket) -> NoReturn:
    """Be the process that was asked for."""

    def run() -> int:
        if order.uid:
            become(order.uid)
        failure = body.prepare(order.preparation)
        if order.preparation is not Preparation.NONE:
            _say_ready(connection, failure)
        return body.run(connection)

    live(order.role, {connection.fileno(), *body.fds}, run)


def _say_ready(connection: socket.socket, failure: str | None) -> None:
    try:
        connection.sendmsg([BLANK_IS_READY if failure is None else BLANK_IS_COLD])
    except OSError as err:  # it finds the end of its connection next
        log.debug("vmm: %s", err)
    else:
        if failure is not None:
            log.warning("not rehearsed, so VMs start more slowly: %s", failure)
