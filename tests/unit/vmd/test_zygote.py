"""The zygote and vmm's side of it: real processes, which are no VMs."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from vmd.confine.sandbox import adopt_orphans
from vmd.vmm.blanks import SPARE_DELAY_NS, Blanks, ForkError
from vmd.wire.channel import Channel
from vmd.wire.internal import VMM_AND_ZYGOTE, ZYGOTE_AND_VMM, Role
from vmd.zygote import process as zygote
from vmm_kvm.loop import EventLoop

TIMEOUT_S = 10.0
PR_SET_CHILD_SUBREAPER = 36


def _answer(connection: socket.socket, rehearses: bool) -> int:
    """Be a process that tells what it knows, and ends with the status that it is told."""
    connection.send(f"{os.getppid()} {rehearses}".encode())
    return int(connection.recv(16) or b"0")


def _tell_level(connection: socket.socket, _rehearses: bool) -> int:
    """Be a process that tells whether it logs what helps to find out why."""
    is_verbose = logging.getLogger("vmd").isEnabledFor(logging.DEBUG)
    connection.send(b"verbose" if is_verbose else b"brief")
    return 0


def _serve(connection: socket.socket) -> None:
    """Be the zygote."""
    status = 1
    with suppress(BaseException):
        bodies = dict.fromkeys(Role, zygote.Body(_answer))
        bodies[Role.NIC] = zygote.Body(_tell_level)
        zygote.serve(Channel(connection, ZYGOTE_AND_VMM), bodies)
        status = 0
    os._exit(status)


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    """Return vmm's event loop."""
    with EventLoop() as made:
        yield made


@pytest.fixture
def zygote_connection() -> Iterator[socket.socket]:
    """Return the connection to a zygote, whose processes become ours, and are gone at the end."""
    adopt_orphans()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        here.close()
        _serve(there)
    there.close()
    with here:
        yield here
    with suppress(ChildProcessError):
        while True:
            os.wait()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def blanks(loop: EventLoop, zygote_connection: socket.socket) -> Iterator[Blanks]:
    """Return vmm's side; a process that is to be a VM is kept ready."""
    made = Blanks(loop, Channel(zygote_connection, VMM_AND_ZYGOTE), (Role.VM,))
    yield made
    made.close()


def _first_words(connection: socket.socket) -> bytes:
    connection.settimeout(TIMEOUT_S)
    return connection.recv(64)


def _wait_until_spares_are_made(loop: EventLoop) -> None:
    timer = loop.timer(loop.stop)
    timer.arm(loop.monotonic_ns() + SPARE_DELAY_NS * 3 // 2)
    loop.run()


def test_what_it_forks_is_a_child_of_vmm(blanks: Blanks) -> None:
    """A process that was asked for is ours: it sees that, and we are told its exit status."""
    blank = blanks.take(Role.DISK)
    with blank.connection as connection:
        assert _first_words(connection) == f"{os.getpid()} False".encode()
        connection.send(b"7")
        assert os.waitstatus_to_exitcode(os.waitpid(blank.pid, 0)[1]) == 7


def test_one_waits_ready(blanks: Blanks, loop: EventLoop) -> None:
    """While nothing starts, a process is made that rehearses; then it is the next one."""
    _wait_until_spares_are_made(loop)
    with blanks.take(Role.VM).connection as ready, blanks.take(Role.VM).connection as other:
        assert _first_words(ready) == f"{os.getpid()} True".encode()
        assert _first_words(other) == f"{os.getpid()} False".encode()


def test_what_is_killed_ends(blanks: Blanks) -> None:
    """The zygote ends a process by its pidfd."""
    blank = blanks.take(Role.DISK)
    with blank.connection as connection:
        _first_words(connection)
        blanks.kill(blank.pid)
        status = os.waitpid(blank.pid, 0)[1]
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def test_without_a_zygote_there_are_no_processes(loop: EventLoop) -> None:
    """A zygote that is gone is an error of one line."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.close()
    blanks = Blanks(loop, Channel(here, VMM_AND_ZYGOTE), ())
    with pytest.raises(ForkError, match=r"^the zygote: cannot send: Broken pipe$"):
        blanks.take(Role.VM)
    blanks.close()


def test_a_zygote_that_hangs_ends_vmm(loop: EventLoop) -> None:
    """What is asked of it fails after its time, in one line, and vmm's loop stops."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    blanks = Blanks(loop, Channel(here, VMM_AND_ZYGOTE), (), patience_s=0.01)
    failures = []

    def take() -> None:
        with pytest.raises(ForkError) as caught:
            blanks.take(Role.VM)
        failures.append(str(caught.value))

    loop.call_soon(take)
    loop.run()
    assert failures == ["the zygote: has not answered for 0.01 s"]
    with pytest.raises(ForkError, match=r"^the zygote: the channel is closed$"):
        blanks.take(Role.VM)
    blanks.close()
    there.close()


def test_a_zygote_that_does_not_read_ends_vmm(loop: EventLoop) -> None:
    """Orders that it leaves in the socket are given up too."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    orders = Channel(here, VMM_AND_ZYGOTE, sent_max=4096)
    blanks = Blanks(loop, orders, (), patience_s=0.01)
    for _ in range(1000):
        if orders.is_closed:
            break
        blanks.kill(os.getpid())
    assert orders.is_closed
    blanks.close()
    there.close()


def test_the_zygote_logs_as_much_as_the_others(
    loop: EventLoop, zygote_connection: socket.socket
) -> None:
    """What it forks does so from the start."""
    blanks = Blanks(loop, Channel(zygote_connection, VMM_AND_ZYGOTE), ())
    told = []
    for level in (1, 2):
        blanks.set_verbosity(level)
        blank = blanks.take(Role.NIC)
        with blank.connection as connection:
            told.append(connection.recv(100))
        os.waitpid(blank.pid, 0)
    blanks.close()
    assert told == [b"brief", b"verbose"]
