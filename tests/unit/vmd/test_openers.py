"""Openers: a client's name gives the same file as the client's own open, with no side effect."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import pytest

from tests.unit.vmd.hostile_paths import GROUP, USER, Tree, closed, openable
from tests.unit.vmd.swapped_paths import SWAPS, Swap
from vmd.children import opener_plan
from vmd.parent import openers as module
from vmd.parent.openers import OPENERS_PER_USER, Openers
from vmd.rules.policy import Users
from vmd.shared.privsep import Plan
from vmd.wire.files import FileUse, FoundFile, WantedFile
from vmd.wire.parcels import opened
from vmm_kvm.loop import EventLoop

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="another user's rights need root")

USERS = Users(frozenset({0}), lambda _uid, _gid: False)
T = TypeVar("T")
SWAPPED = 60
"""The number of opens of a changing name."""
Result = tuple[int, int] | str
"""Device and inode of the opened file, or the error."""


@pytest.fixture
def tree() -> Iterator[Tree]:
    """Return a directory that every user can enter."""
    with TemporaryDirectory(prefix="vmd-") as directory:
        Path(directory).chmod(0o711)
        made = Tree(Path(directory))
        yield made
        made.close()


class Host:
    """Openers in an event loop, and their results."""

    def __init__(self, loop: EventLoop, plan: object = opener_plan) -> None:
        self.loop = loop
        self.openers = Openers(loop, USERS, plan)  # type: ignore[arg-type] # see the tests
        self.results: list[Result] = []
        self.owners: set[int] = set()
        """The owners of all opened files."""

    def ask(self, path: str, *, writes: bool, uid: int = USER) -> None:
        """Have a file opened."""
        wanted = WantedFile(use=FileUse.INITRD, path=path, writes=writes)
        place = len(self.results)
        self.results.append("not answered")

        def then(found: list[FoundFile], parcels: list[int]) -> None:
            assert [file.chain for file in found] == [(0,)]
            fds = opened(parcels)
            status = os.fstat(fds[0])
            self.owners.add(status.st_uid)
            for fd in fds:
                os.close(fd)
            answer((status.st_dev, status.st_ino))

        def answer(result: Result) -> None:
            self.results[place] = result
            if "not answered" not in self.results:
                self.loop.stop()

        self.openers.open(uid, [wanted], [], then, lambda err: answer(str(err)))

    def finish(self) -> list[Result]:
        """Wait for all answers and processes."""
        if "not answered" in self.results:
            self.loop.run()
        self.reap()
        results, self.results = self.results, []
        return results

    def result(self, path: str, *, writes: bool) -> Result:
        """Have a file opened; returns the result."""
        self.ask(path, writes=writes)
        return self.finish()[0]

    def all(self, paths: list[str]) -> list[list[Result]]:
        """Have files opened, for reading and for writing."""
        found: list[Result] = []
        wanted = [(path, writes) for path in paths for writes in (False, True)]
        for some in batched(wanted, OPENERS_PER_USER):
            for path, writes in some:
                self.ask(path, writes=writes)
            found += self.finish()
        return batched(found, 2)

    def reap(self) -> None:
        """Wait for all processes."""
        for pid in tuple(self.openers.pids):
            os.waitpid(pid, 0)
            self.openers.ended(pid)
        self.loop.call_soon(self.loop.stop)
        self.loop.run()


def batched(items: list[T], count: int) -> list[list[T]]:
    """Divide a list into such of `count` items."""
    return [items[at : at + count] for at in range(0, len(items), count)]


@pytest.fixture
def host() -> Iterator[Host]:
    """Return the host of the openers."""
    with EventLoop() as loop:
        yield Host(loop)


def _own_opens(paths: list[str]) -> list[list[Result]]:
    """Return the results of the user's own open, for reading and for writing."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setgroups([GROUP])
        os.setresgid(GROUP, GROUP, GROUP)
        os.setresuid(USER, USER, USER)
        found = [[_own_open(path, flags) for flags in (os.O_RDONLY, os.O_RDWR)] for path in paths]
        with os.fdopen(writer, "w") as file:
            json.dump(found, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        told = json.load(file)
    os.waitpid(pid, 0)
    return [[tuple(each) if isinstance(each, list) else each for each in one] for one in told]


def _own_open(path: str, flags: int) -> Result:
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as err:
        return errno.errorcode[err.errno or 0]
    except ValueError:
        return "EINVAL"
    status = os.fstat(fd)
    os.close(fd)
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else "EISDIR"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_names_are_opened_as_by_their_user(tree: Tree, host: Host) -> None:
    """Hundreds of names open the same file as the user's own open, or fail as it does."""
    paths = list(openable(tree))
    expected = _own_opens(paths)
    wrong = [
        (path, wanted, found)
        for path, own, opened in zip(paths, expected, host.all(paths), strict=True)
        for wanted, found in zip(own, opened, strict=True)
        if found != wanted and not (isinstance(found, str) and isinstance(wanted, str))
    ]
    assert wrong == []
    assert any(not isinstance(own[1], str) for own in expected)
    assert 2 * len(paths) >= 500


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_names_that_nobody_opens_for_a_user(tree: Tree, host: Host) -> None:
    """Links of /proc, devices, FIFOs, sockets, directories are refused without side effects."""
    deleted = os.open(tree.file("deleted", 0o666), os.O_RDWR)
    (tree.root / "deleted").unlink()
    memory = os.memfd_create("memory")
    paths = list(closed(tree, [deleted, memory]))
    waiting = os.open(tree.root / "node0", os.O_RDONLY | os.O_NONBLOCK)
    opened = [
        (path, found)
        for path, both in zip(paths, host.all(paths), strict=True)
        for found in both
        if not isinstance(found, str)
    ]
    assert opened == []
    poll = select.poll()
    poll.register(waiting, select.POLLIN)
    assert poll.poll(0) == []
    for fd in (deleted, memory, waiting):
        os.close(fd)


@pytest.mark.slow
@pytest.mark.parametrize("swap", SWAPS, ids=lambda swap: str(swap.__name__))
def test_a_name_that_changes_while_it_is_opened(tree: Tree, host: Host, swap: Swap) -> None:
    """A name that changes all the time opens the user's file or none, never root's."""
    os.mkfifo(tree.root / "fifo", 0o666)
    waiting = os.open(tree.root / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    name, steps = swap(tree)
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                for step in steps:
                    step()
        finally:
            os._exit(1)
    try:
        for _ in range(SWAPPED):
            host.result(name, writes=True)
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert host.owners == {USER}
    poll = select.poll()
    poll.register(waiting, select.POLLIN)
    assert poll.poll(0) == []
    os.close(waiting)


def test_the_error_tells_nothing_of_a_closed_directory(tree: Tree, host: Host) -> None:
    """A user who may not search a directory gets the same error for missing and closed files."""
    home = tree.root / "home"
    home.mkdir(mode=0o700)
    tree.file("home/notes", 0o666, 0)
    told = {
        str(host.result(str(home / name), writes=False)).replace(name, "NAME")
        for name in ("notes", "missing")
    }
    assert told == {f"initrd {home}/NAME: Permission denied"}


def test_one_that_takes_too_long_is_ended(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """If an opener takes too long the start fails in time, and the process is gone."""

    def plan(_uid: int) -> Plan:
        made = opener_plan(USER)
        return made._replace(body=lambda _connection: signal.pause())

    monkeypatch.setattr(module, "TIME_LIMIT_S", 0.05)
    slow = Host(host.loop, plan)
    assert slow.result("/etc/passwd", writes=False) == "the files could not be opened in 0.05 s"
    assert list(slow.openers.pids) == []


def test_a_user_has_a_few_at_a_time(host: Host) -> None:
    """More openers of one user are refused at once; other users' are not."""

    def plan(_uid: int) -> Plan:
        return opener_plan(USER)._replace(body=lambda _connection: signal.pause())

    slow = Host(host.loop, plan)
    for _ in range(OPENERS_PER_USER + 1):
        slow.ask("/etc/passwd", writes=False)
    assert slow.results[OPENERS_PER_USER] == "too many starts of yours wait for files"
    slow.ask("/etc/passwd", writes=False, uid=USER - 1)
    assert slow.results.count("not answered") == OPENERS_PER_USER + 1
    pids = list(slow.openers.pids)
    slow.openers.close()
    assert len(pids) == OPENERS_PER_USER + 1
    slow.reap()


def test_administrators_need_none(host: Host, tree: Tree) -> None:
    """The daemon itself opens administrators' files, except links of /proc."""
    path = tree.file("secret", 0o600, 0)
    status = Path(path).stat()
    host.ask(path, writes=True, uid=0)
    host.ask("/proc/self/fd/0", writes=True, uid=0)
    assert list(host.openers.pids) == []
    assert host.results[0] == (status.st_dev, status.st_ino)
    assert "a link of /proc" in str(host.results[1])
