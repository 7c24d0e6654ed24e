"""The zygote and vmm's side of it: real processes, which are no VMs."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from vmd.confine.sandbox import adopt_orphans
from vmd.vmm.blanks import SPARE_DELAY_NS, Blanks, Ended, ForkError
from vmd.wire.blank import Role
from vmd.wire.channel import Channel
from vmd.wire.forking import VMM_AND_ZYGOTE, ZYGOTE_AND_VMM
from vmd.zygote import process as zygote
from vmm_kvm.errors import VmmError
from vmm_kvm.loop import EventLoop

Prepare = Callable[[bool], str | None]

TIMEOUT_S = 10.0
PR_SET_CHILD_SUBREAPER = 36

_rehearsed = False


def _answer(connection: socket.socket) -> int:
    """Be a process that tells what it knows, and ends with the status that it is told."""
    connection.send(f"{os.getppid()} {_rehearsed}".encode())
    return int(connection.recv(16) or b"0")


def _prepare(rehearses: bool) -> str | None:
    global _rehearsed  # noqa: PLW0603 - of the process that is forked
    _rehearsed = rehearses
    return None


def _prepare_by_failing(rehearses: bool) -> str | None:
    """Fail to rehearse."""
    if rehearses:
        raise VmmError("no rehearsal")
    return _prepare(rehearses)


def _prepare_coldly(rehearses: bool) -> str | None:
    """Say that no rehearsal is possible."""
    _prepare(rehearses)
    return "no machine" if rehearses else None


def _prepare_for_ever(_rehearses: bool) -> str | None:
    """Never be ready."""
    signal.pause()
    return None


def _tell_level(connection: socket.socket) -> int:
    """Be a process that tells whether it logs what helps to find out why."""
    is_verbose = logging.getLogger("vmd").isEnabledFor(logging.DEBUG)
    connection.send(b"verbose" if is_verbose else b"brief")
    return 0


def _serve(connection: socket.socket, prepare: Prepare) -> None:
    """Be the zygote."""
    status = 1
    with suppress(BaseException):
        bodies = dict.fromkeys(Role, zygote.Body(prepare, _answer))
        bodies[Role.NIC] = zygote.Body(prepare, _tell_level)
        zygote.serve(Channel(connection, ZYGOTE_AND_VMM), bodies)
        status = 0
    os._exit(status)


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    """Return vmm's event loop."""
    with EventLoop() as made:
        yield made


@pytest.fixture
def prepare() -> Prepare:
    """Return what a process does before it waits; a test may have another."""
    return _prepare


@pytest.fixture
def zygote_connection(prepare: Prepare) -> Iterator[socket.socket]:
    """Return the connection to a zygote, whose processes become ours, and are gone at the end."""
    adopt_orphans()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        here.close()
        _serve(there, prepare)
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
    channel = Channel(zygote_connection, VMM_AND_ZYGOTE)
    made = Blanks(loop, channel, 0, (Role.VM,), rehearses=True)
    yield made
    made.close()


def _first_words(connection: socket.socket) -> bytes:
    connection.settimeout(TIMEOUT_S)
    return connection.recv(64)


def _wait_for_spares(loop: EventLoop, delays: int = 1) -> None:
    """Let vmm work for as long as it takes to make a process ahead so many times."""
    timer = loop.timer(loop.stop)
    timer.arm(loop.monotonic_ns() + SPARE_DELAY_NS * (2 * delays + 1) // 2)
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
    _wait_for_spares(loop)
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
    blanks = Blanks(loop, Channel(here, VMM_AND_ZYGOTE), 0, (), rehearses=False)
    with pytest.raises(ForkError, match=r"^the zygote: cannot send: Broken pipe$"):
        blanks.take(Role.VM)
    blanks.close()


def test_a_zygote_that_hangs_ends_vmm(loop: EventLoop) -> None:
    """What is asked of it fails after its time, in one line, and vmm's loop stops."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    blanks = Blanks(loop, Channel(here, VMM_AND_ZYGOTE), 0, (), rehearses=False, patience_s=0.01)
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
    blanks = Blanks(loop, orders, 0, (), rehearses=False, patience_s=0.01)
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
    blanks = Blanks(loop, Channel(zygote_connection, VMM_AND_ZYGOTE), 0, (), rehearses=False)
    told = []
    for level in (1, 2):
        blanks.set_verbosity(level)
        blank = blanks.take(Role.NIC)
        with blank.connection as connection:
            told.append(connection.recv(100))
        os.waitpid(blank.pid, 0)
    blanks.close()
    assert told == [b"brief", b"verbose"]


def _reap(blanks: Blanks) -> list[int]:
    """Be vmm when children have ended; returns those that were made ahead."""
    found = []
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended
            if blanks.ended(pid, os.waitstatus_to_exitcode(status)) is Ended.SPARE:
                found.append(pid)
    return found


@pytest.mark.parametrize("prepare", [_prepare_by_failing], ids=["fails"])
def test_a_rehearsal_that_fails_is_not_tried_again(
    blanks: Blanks, loop: EventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    """The next process that is made ahead does not rehearse, and is ready."""
    _wait_for_spares(loop)
    assert len(_reap(blanks)) == 1
    assert caplog.messages == ["the vm process made ahead has ended, status 1"]
    _wait_for_spares(loop)
    assert _reap(blanks) == []
    with blanks.take(Role.VM).connection as ready:
        assert _first_words(ready) == f"{os.getpid()} False".encode()


@pytest.mark.parametrize("prepare", [_prepare_coldly], ids=["cold"])
def test_what_cannot_rehearse_is_of_use(blanks: Blanks, loop: EventLoop) -> None:
    """It is the next that is taken; the one after does not try."""
    _wait_for_spares(loop)
    with blanks.take(Role.VM).connection as ready:
        assert _first_words(ready) == f"{os.getpid()} True".encode()
    _wait_for_spares(loop)
    with blanks.take(Role.VM).connection as ready:
        assert _first_words(ready) == f"{os.getpid()} False".encode()


@pytest.mark.parametrize("prepare", [_prepare_for_ever], ids=["hangs"])
def test_a_process_that_is_never_ready_is_given_up(
    blanks: Blanks,
    loop: EventLoop,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is killed after its time, as is the next that does not rehearse; then none is made."""
    monkeypatch.setattr("vmd.vmm.blanks.SPARE_PATIENCE_NS", SPARE_DELAY_NS // 4)
    _wait_for_spares(loop, 4)
    assert caplog.messages == ["the vm process made ahead is not ready: killed"] * 2
    _reap(blanks)
    caplog.clear()
    _wait_for_spares(loop, 2)
    assert caplog.messages == []
