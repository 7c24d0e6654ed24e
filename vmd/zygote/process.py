"""The zygote: it forks the processes that vmm asks for, and does nothing else.

A fork shares every page of memory until one side writes to it, and an interpreter writes nearly
all that it looks at. So whoever is forked from should have done all that its children will do, and
nothing since: everything that they may import is imported, and their code has run. vmm, which is
busy whenever VMs start, would leave each of its children another version of the pages that it uses.

What is forked becomes a child of vmm, by way of a process in between that ends at once: vmm is told
by the kernel when it ends, and may kill it without fear for another that has its pid.
"""

import os
import signal
import socket
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn, assert_never

from vmd.shared import log as logging
from vmd.shared.privsep import live
from vmd.wire.blank import BLANK_IS_COLD, BLANK_IS_READY, Preparation, Role
from vmd.wire.channel import Channel, ChannelError
from vmd.wire.forking import EndProcess, Fork, Forked, ForkFailed, Serving, VmmToZygote, ZygoteToVmm
from vmd.wire.internal import SetVerbosity
from vmm_kvm.log import Log

log = Log(__name__)


class Body(NamedTuple):
    """What a process does."""

    prepare: Callable[[bool], str | None]
    """Confines it, and rehearses if that is asked for; returns why it cannot."""
    run: Callable[[socket.socket], int]
    """Takes over its connection to vmm; returns the exit status."""
    fds: tuple[int, ...] = ()
    """Descriptors that it has."""


def serve(vmm: Channel[ZygoteToVmm, VmmToZygote], bodies: Mapping[Role, Body]) -> None:
    """Fork what `vmm` asks for until it is gone."""
    vmm.send(Serving(pid=os.getpid()))
    while True:
        try:
            order, fds, _size = vmm.wait()
        except ChannelError as err:
            log.debug("vmm: %s", err)
            return
        with fds:
            if isinstance(order, SetVerbosity):
                logging.set_verbosity(order.level)
                continue
            try:
                fd = fds.take(0)
            except ChannelError as err:
                log.warning("%s: %s", type(order).__name__, err)
                if isinstance(order, Fork):
                    vmm.send(ForkFailed(message=str(err)))
                continue
            match order:
                case Fork(role=role):
                    with socket.socket(fileno=fd) as connection:
                        _fork(vmm, order, bodies[role], connection)
                case EndProcess():
                    _kill(fd)
                case _:
                    assert_never(order)


def _kill(pidfd: int) -> None:
    # Landlock lets a process signal those that it has confined, and those below them, alone: we
    # have, and vmm has not.
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        log.debug("what was to be killed has ended")
    finally:
        os.close(pidfd)


def _fork(
    vmm: Channel[ZygoteToVmm, VmmToZygote], order: Fork, body: Body, connection: socket.socket
) -> None:
    read_fd, write_fd = os.pipe()
    try:
        between = os.fork()
        if between == 0:
            _fork_again(vmm, order, body, connection, read_fd)
        os.waitpid(between, 0)
    except OSError as err:
        vmm.send(ForkFailed(message=err.strerror or str(err)))
    finally:
        os.close(read_fd)
        os.close(write_fd)


def _fork_again(
    vmm: Channel[ZygoteToVmm, VmmToZygote],
    order: Fork,
    body: Body,
    connection: socket.socket,
    pipe: int,
) -> NoReturn:
    """Be the process in between."""
    try:
        pid = os.fork()
        if pid == 0:
            begin(order, body, connection, pipe)
        vmm.send(Forked(pid=pid))
    except OSError as err:
        vmm.send(ForkFailed(message=err.strerror or str(err)))
    finally:
        os._exit(0)


def begin(order: Fork, body: Body, connection: socket.socket, pipe: int) -> NoReturn:
    """Be the process that was asked for, once `pipe` has no other side: vmm is its parent then."""

    def run() -> int:
        os.read(pipe, 1)  # nothing, when the zygote and the one in between have closed it
        os.close(pipe)
        failure = body.prepare(order.preparation is Preparation.REHEARSED)
        if order.preparation is not Preparation.NONE:
            _say_ready(connection, failure)
        return body.run(connection)

    live(order.role, {connection.fileno(), pipe, *body.fds}, run)


def _say_ready(connection: socket.socket, failure: str | None) -> None:
    try:
        connection.sendmsg([BLANK_IS_READY if failure is None else BLANK_IS_COLD])
    except OSError as err:  # it finds the end of its connection next
        log.debug("vmm: %s", err)
    else:
        if failure is not None:
            log.warning("not rehearsed, so VMs start more slowly: %s", failure)
