"""The zygote and vmm's side of it: real processes, which are no VMs."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from tests.unit.vmd.far import run_until
from vmd.vmm.blanks import SPARE_DELAY_NS, Blank, Blanks, Ended, ForkError
from vmd.wire.blank import BLANK_IS_READY, Preparation, Role
from vmd.wire.channel import Channel
from vmd.wire.forking import VMM_AND_ZYGOTE, ZYGOTE_AND_VMM, Fork, Forked, VmmToZygote, ZygoteToVmm
from vmd.zygote import process as zygote
from vmm_kvm.errors import VmmError
from vmm_kvm.loop import EventLoop

Prepare = Callable[[Preparation], str | None]

TIMEOUT_S = 10.0

_preparation: Preparation | None = None


def _channel(connection: socket.socket) -> Channel[VmmToZygote, ZygoteToVmm]:
    return Channel(connection, VMM_AND_ZYGOTE, asks_pids=True)


def _answer(connection: socket.socket) -> int:
    """Be a process that reports its state, and ends with the requested status."""
    connection.send(f"{os.getppid()} {_preparation}".encode())
    return int(connection.recv(16) or b"0")


def _prepare(preparation: Preparation) -> str | None:
    global _preparation  # noqa: PLW0603 - of the process that is forked
    _preparation = preparation
    return None


def _prepare_by_failing(preparation: Preparation) -> str | None:
    """Fail to rehearse."""
    if preparation is Preparation.REHEARSED:
        raise VmmError("no rehearsal")
    return _prepare(preparation)


def _prepare_coldly(preparation: Preparation) -> str | None:
    """Say that no rehearsal is possible."""
    _prepare(preparation)
    return "no machine" if preparation is Preparation.REHEARSED else None


def _prepare_for_ever(_preparation: Preparation) -> str | None:
    """Never be ready."""
    signal.pause()
    return None


def _tell_level(connection: socket.socket) -> int:
    """Be a process that reports whether it logs debug messages."""
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
    """Return a process's work before it waits; a test may replace it."""
    return _prepare


@pytest.fixture
def zygote_connection(prepare: Prepare) -> Iterator[socket.socket]:
    """Return the connection to a zygote, whose children are ours, and are gone at the end."""
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


@pytest.fixture
def blanks(loop: EventLoop, zygote_connection: socket.socket) -> Iterator[Blanks]:
    """Return vmm's side; a process for a VM is kept ready."""
    channel = _channel(zygote_connection)
    made = Blanks(loop, channel, 0, (Role.VM,), rehearses=True)
    yield made
    made.close()


def _take(blanks: Blanks, loop: EventLoop, role: Role, uid: int = 0) -> Blank:
    """Return a process, made or waiting."""
    pids: list[int] = []
    failures: list[ForkError] = []
    blank = blanks.take(role, uid, pids.append, failures.append)
    if not blank.pid:
        run_until(loop, lambda: bool(pids or failures))
        assert failures == []
    return Blank(blank.connection, blank.pid or pids[0])


def _fails(err: ForkError) -> None:
    raise AssertionError(err)


def _first_words(connection: socket.socket) -> bytes:
    connection.settimeout(TIMEOUT_S)
    return connection.recv(64)


def _wait_for_spares(loop: EventLoop, delays: int = 1) -> None:
    """Let vmm work until it has made a process ahead `count` times."""
    timer = loop.timer(loop.stop)
    timer.arm(loop.monotonic_ns() + SPARE_DELAY_NS * (2 * delays + 1) // 2)
    loop.run()


def test_what_it_forks_is_a_child_of_vmm(blanks: Blanks, loop: EventLoop) -> None:
    """A requested process is our child, and we get its exit status."""
    blank = _take(blanks, loop, Role.DISK)
    with blank.connection as connection:
        assert _first_words(connection) == f"{os.getpid()} none".encode()
        connection.send(b"7")
        assert os.waitstatus_to_exitcode(os.waitpid(blank.pid, 0)[1]) == 7


def test_one_waits_ready(blanks: Blanks, loop: EventLoop) -> None:
    """When idle, a process is made ahead and rehearses; then it is the next one used."""
    _wait_for_spares(loop)
    with (
        _take(blanks, loop, Role.VM).connection as ready,
        _take(blanks, loop, Role.VM).connection as other,
    ):
        assert _first_words(ready) == f"{os.getpid()} rehearsed".encode()
        assert _first_words(other) == f"{os.getpid()} none".encode()


def test_clones_are_prepared_for(loop: EventLoop) -> None:
    """When clones are expected, the next process made ahead rehearses being one."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    prepared = []
    with Channel(there, ZYGOTE_AND_VMM) as far:
        blanks = Blanks(loop, _channel(here), 0, (Role.VM,), rehearses=True)
        for are_expected in (True, False):
            blanks.expect_clones(are_expected)
            _wait_for_spares(loop)
            order, fds, _size = far.wait()
            assert isinstance(order, Fork)
            prepared.append(order.preparation)
            with socket.socket(fileno=fds.take(0)) as spare:
                spare.send(BLANK_IS_READY)
                far.send(Forked(order=order.order))
                run_until(loop, lambda: not blanks.has_orders)
                taken = blanks.take(Role.VM, 0, lambda _pid: None, _fails)
                assert taken.pid
                taken.connection.close()
        blanks.close()
    assert prepared == [Preparation.CLONE, Preparation.REHEARSED]


def test_what_a_vm_has_not_taken_ends_later(loop: EventLoop) -> None:
    """It does not take the processors from the VM that starts, but from nobody later."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with Channel(there, ZYGOTE_AND_VMM) as far:
        blanks = Blanks(loop, _channel(here), 0, (Role.DISK,), rehearses=False, uids=(5, 6))
        _wait_for_spares(loop)
        order, fds, _size = far.wait()
        assert isinstance(order, Fork)
        with socket.socket(fileno=fds.take(0)) as spare:
            spare.setblocking(False)
            far.send(Forked(order=order.order))
            blanks.settle(blanks.claim())
            with pytest.raises(BlockingIOError):
                spare.recv(1)
            _wait_for_spares(loop)
            assert spare.recv(1) == b""
        blanks.close()


def test_what_is_killed_ends(blanks: Blanks, loop: EventLoop) -> None:
    """The zygote ends a process by its pidfd."""
    blank = _take(blanks, loop, Role.DISK)
    with blank.connection as connection:
        _first_words(connection)
        blanks.kill(blank.pid, _fails)
        run_until(loop, lambda: not blanks.has_orders)
        status = os.waitpid(blank.pid, 0)[1]
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def test_without_a_zygote_there_are_no_processes(loop: EventLoop) -> None:
    """A zygote that is gone is an error of one line."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.close()
    blanks = Blanks(loop, _channel(here), 0, (), rehearses=False)
    with pytest.raises(ForkError, match=r"^the zygote: cannot send: Broken pipe$"):
        blanks.take(Role.VM, 0, lambda _pid: None, _fails)
    blanks.close()


def test_a_zygote_that_hangs_is_abandoned(loop: EventLoop) -> None:
    """Requests to a hanging zygote fail at their time-out, in one line; vmm works on."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    blanks = Blanks(loop, _channel(here), 0, (), rehearses=False, patience_s=0.05)
    failures: list[str] = []
    told: list[bool] = []

    def abandoned() -> None:
        told.append(blanks.is_abandoned)
        loop.stop()

    blanks.serve(lambda _pid, _status: None, abandoned)
    for _ in range(2):
        blank = blanks.take(Role.VM, 0, lambda _pid: None, lambda err: failures.append(str(err)))
        blank.connection.close()
    blanks.kill(os.getpid(), lambda err: failures.append(str(err)))
    loop.call_soon(lambda: told.append(blanks.is_abandoned))
    loop.run()
    assert told == [False, True]
    line = "the zygote has not answered for 0.05 s"
    assert failures == [line] * 3
    with pytest.raises(ForkError, match=f"^{line}$"):
        blanks.take(Role.VM, 0, lambda _pid: None, _fails)
    blanks.close()
    there.close()


def test_what_ended_before_it_was_told_of(loop: EventLoop) -> None:
    """If vmm reaps a process before it reads of its start, the end is reported then."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid, status = os.getpid(), 7  # the kernel gives the sender's pid
    with Channel(there, ZYGOTE_AND_VMM) as far:
        blanks = Blanks(loop, _channel(here), 0, (), rehearses=False)
        seen: list[tuple[int, ...]] = []
        blanks.serve(lambda *ended: seen.append(ended), loop.stop)
        blank = blanks.take(Role.VM, 0, lambda told: seen.append((told,)), _fails)
        assert blanks.ended(pid, status) is Ended.UNKNOWN
        far.send(Forked(order=_order_of(far)))
        run_until(loop, lambda: not blanks.has_orders)
        assert seen == [(pid,), (pid, status)]
        blank.connection.close()
        blanks.close()


def _order_of(far: Channel[ZygoteToVmm, VmmToZygote]) -> int:
    message, fds, _size = far.wait()
    fds.close()
    assert isinstance(message, Fork)
    return message.order


def test_a_process_that_ends_before_it_says_that_it_is_there(loop: EventLoop) -> None:
    """If a process ends early only its order fails; the zygote is not to blame."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    failures: list[str] = []
    with Channel(there, ZYGOTE_AND_VMM) as far:
        channel = _channel(here)
        blanks = Blanks(loop, channel, 0, (), rehearses=False, patience_s=0.05)
        blank = blanks.take(Role.VM, 0, lambda _pid: None, lambda err: failures.append(str(err)))
        _order_of(far)  # the other end of its connection is closed
        run_until(loop, lambda: bool(failures))
        assert failures == ["its process has ended"]
        assert not blanks.is_abandoned
        blank.connection.close()
        blanks.close()


def test_each_vm_has_a_uid(loop: EventLoop) -> None:
    """A uid in use is not given twice; without any left, the reason is one line."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with Channel(there, ZYGOTE_AND_VMM) as far:
        blanks = Blanks(loop, _channel(here), 0, (), rehearses=False, uids=(5, 6))
        uid = blanks.claim()
        blank = blanks.take(Role.VM, uid, lambda _pid: None, _fails)
        order, fds, _size = far.wait()
        fds.close()
        assert isinstance(order, Fork)
        assert order.uid == uid
        far.send(Forked(order=order.order))
        run_until(loop, lambda: not blanks.has_orders)
        assert {uid, blanks.claim()} == {5, 6}
        blanks.release(uid)
        with pytest.raises(ForkError, match=r"^all uids are in use \(vmd --uids\)$"):
            blanks.claim()
        blanks.ended(os.getpid(), 0)
        assert blanks.claim() == uid
        blank.connection.close()
        blanks.close()


def test_the_zygote_logs_as_much_as_the_others(
    loop: EventLoop, zygote_connection: socket.socket
) -> None:
    """The zygote and its children have the log level from the start."""
    blanks = Blanks(loop, _channel(zygote_connection), 0, (), rehearses=False)
    told = []
    for level in (1, 2):
        blanks.set_verbosity(level)
        blank = _take(blanks, loop, Role.NIC)
        with blank.connection as connection:
            told.append(connection.recv(100))
        os.waitpid(blank.pid, 0)
    blanks.close()
    assert told == [b"brief", b"verbose"]


def _reap(blanks: Blanks) -> list[int]:
    """Reap ended children as vmm does; returns those that were made ahead."""
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
    """The next process made ahead does not rehearse, and is ready."""
    _wait_for_spares(loop)
    assert len(_reap(blanks)) == 1
    assert caplog.messages == ["the vm process made ahead has ended, status 1"]
    _wait_for_spares(loop)
    assert _reap(blanks) == []
    with _take(blanks, loop, Role.VM).connection as ready:
        assert _first_words(ready) == f"{os.getpid()} confined".encode()


@pytest.mark.parametrize("prepare", [_prepare_coldly], ids=["cold"])
def test_what_cannot_rehearse_is_of_use(blanks: Blanks, loop: EventLoop) -> None:
    """The unrehearsed process is the next one used; the one after does not try."""
    _wait_for_spares(loop)
    with _take(blanks, loop, Role.VM).connection as ready:
        assert _first_words(ready) == f"{os.getpid()} rehearsed".encode()
    _wait_for_spares(loop)
    with _take(blanks, loop, Role.VM).connection as ready:
        assert _first_words(ready) == f"{os.getpid()} confined".encode()


@pytest.mark.parametrize("prepare", [_prepare_for_ever], ids=["hangs"])
def test_a_process_that_is_never_ready_is_given_up(
    blanks: Blanks,
    loop: EventLoop,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is killed at its time-out, as is the next, which does not rehearse; then none is made."""
    monkeypatch.setattr("vmd.vmm.blanks.SPARE_PATIENCE_NS", SPARE_DELAY_NS // 4)
    _wait_for_spares(loop, 4)
    assert caplog.messages == ["the vm process made ahead is not ready: killed"] * 2
    _reap(blanks)
    caplog.clear()
    _wait_for_spares(loop, 2)
    assert caplog.messages == []
