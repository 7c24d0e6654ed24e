"""Ten thousand attempts to leave a shared directory, while the host swaps its contents."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fuse_client import OWN_INODE, FuseClient
from vmm_kvm.fs import abi

ATTEMPTS = 10_000
SECRET = b"not for guests"
ROOT = abi.FUSE_ROOT_ID
# Swaps a directory for links out, and a file in it, as fast as it can, all the time.
SWAPPER = """
import os, sys
from contextlib import suppress
tree, outside = sys.argv[1:]
os.chdir(tree)

def write(name):
    with open(name, "xb") as new:
        new.write(b"inside")

steps = (
    lambda: os.rename("swapped", "kept"),
    lambda: os.symlink(outside, "swapped"),
    lambda: os.unlink("swapped"),
    lambda: os.symlink("/proc/self/root", "swapped"),
    lambda: os.unlink("swapped"),
    lambda: os.rename("kept", "swapped"),
    lambda: os.mkdir("swapped"),
    lambda: os.symlink(outside + "/secret", "swapped/flip"),
    lambda: os.rename("swapped/flip", "swapped/file"),
    lambda: write("swapped/flop"),
    lambda: os.rename("swapped/flop", "swapped/file"),
)
print(flush=True)
while True:
    for step in steps:
        with suppress(OSError):
            step()
"""


@contextmanager
def swapping(tree: Path, outside: Path) -> Iterator[None]:
    """Have another process change the tree meanwhile."""
    process = subprocess.Popen(
        [sys.executable, "-c", SWAPPER, str(tree), str(outside)], stdout=subprocess.PIPE
    )
    assert process.stdout
    try:
        assert process.stdout.readline() == b"\n"
        yield
        assert process.poll() is None, "it has ended"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Attacker:
    """A guest that tries everything it can name; `got` is all that it has read."""

    def __init__(self, client: FuseClient, outside: Path, seed: int) -> None:
        self._client = client
        self._chance = random.Random(seed)
        self._outside = os.fsencode(outside)
        self.nodes = [ROOT]
        self.got: list[bytes] = []
        self.inodes: set[int] = set()
        self.made = 0

    def attempt(self) -> str:
        """Do one thing; returns the result."""
        ways: tuple[Callable[[], None], ...] = (
            self._look_up,
            self._walk,
            self._read,
            self._list,
            self._make,
            self._link,
            self._rename,
            self._create,
            self._remove,
        )
        way = self._chance.choice(ways)
        try:
            way()
        except OSError as err:
            return f"{way.__name__}: {err.strerror}"
        return way.__name__

    def _name(self) -> bytes:
        own = b"%d" % os.getpid()
        fd = b"%d" % self._chance.randrange(64)
        return self._chance.choice(
            (
                *(b"..", b".", b"", b"../outside/secret", b"swapped/../../outside"),
                *(self._outside, self._outside + b"/secret", b"/", b"/etc/passwd", b"//proc"),
                *(b"/proc/self/fd/" + fd, b"/proc/" + own + b"/root", b"/dev/fd/" + fd, fd),
                *(b"out", b"absolute", b"proc", b"up", b"swapped", b"file", b"flip", b"kept"),
                *(b"swapped\\..\\..", b"..\xc0\xaf..", b"\xff\xfe", b"x" * 255, b"x" * 256),
                *(b"deep", b"n%d" % self._chance.randrange(8)),
            )
        )

    def _node(self) -> int:
        if not self._chance.randrange(20):
            return self._chance.choice((0, 2, 1 << 63, self._chance.randrange(1 << 16)))
        return self._chance.choice(self.nodes)

    def _keep(self, node: int) -> None:
        self.nodes.append(node)
        if len(self.nodes) > 64:
            self._client.forget(self.nodes.pop(self._chance.randrange(1, 64)))

    def _look_up(self) -> None:
        found = self._client.look_up(self._name(), self._node())
        self.inodes.add(found.attributes.ino & OWN_INODE)
        self._keep(found.node)

    def _walk(self) -> None:
        found = self._client.look_up(b"swapped")
        inner = self._client.look_up(b"file", found.node)
        self.inodes |= {one.attributes.ino & OWN_INODE for one in (found, inner)}
        self._keep(inner.node)
        self.got.append(self._client.content(inner.node))

    def _read(self) -> None:
        self.got.append(self._client.content(self._node()))

    def _list(self) -> None:
        for entry in self._client.listing(self._node(), plus=True):
            if entry.node:
                self._keep(entry.node)

    def _make(self) -> None:
        chance = self._chance.randrange(3)
        if chance == 0:
            targets = (self._outside, b"/", b"..", b"/proc/self/fd", self._outside + b"/secret")
            target = self._chance.choice(targets)
            found = self._client.make_symlink(self._name(), target, self._node())
        elif chance == 1:
            found = self._client.make_directory(self._name(), self._node())
        else:
            kind = self._chance.choice((stat.S_IFREG, stat.S_IFIFO, stat.S_IFCHR))
            found = self._client.make_node(self._name(), kind | 0o600, self._node())
        self._keep(found.node)

    def _link(self) -> None:
        self._client.link(self._node(), self._name(), self._node())

    def _rename(self) -> None:
        flags = self._chance.choice((0, 0, 1, 2))
        names = self._name(), self._name()
        self._client.rename(*names, self._node(), self._node(), flags=flags)

    def _create(self) -> None:
        flags = self._chance.choice((os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_WRONLY))
        found, handle = self._client.create(self._name(), self._node(), flags=flags)
        try:
            self._client.write(handle, b"from the guest")
        finally:
            self._client.release(handle)
        self._keep(found.node)
        self.made += 1

    def _remove(self) -> None:
        if self._chance.randrange(2):
            self._client.unlink(self._name(), self._node())
        else:
            self._client.remove_directory(self._name(), self._node())


def state_of(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return what must not change: all names outside, contents, modes, links."""
    state: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        found = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(found.st_mode) else b""
        state[str(path)] = found.st_ino, found.st_mode, found.st_nlink, found.st_mtime_ns, content
    return state


@pytest.mark.parametrize("is_writable", [True, False])
def test_nothing_leaves_the_tree(tmp_path: Path, is_writable: bool) -> None:
    """No name, link, race or rename reads, changes, or even sees a file outside."""
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    (tree / "swapped").mkdir(parents=True)
    (tree / "swapped" / "file").write_bytes(b"inside")
    (tree / "deep" / "deep").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_bytes(SECRET)
    (outside / "file").write_bytes(SECRET)
    (outside / "empty").mkdir()
    (tree / "out").symlink_to(outside)
    (tree / "absolute").symlink_to("/etc/passwd")
    (tree / "proc").symlink_to("/proc/self/fd")
    (tree / "up").symlink_to("..")
    before = state_of(outside)
    forbidden = {outside.stat().st_ino, tmp_path.stat().st_ino}
    forbidden |= {path.lstat().st_ino for path in outside.iterdir()}
    results: Counter[str] = Counter()
    with FuseClient(tree, is_writable=is_writable, descriptors=64) as client:
        attacker = Attacker(client, outside, seed=is_writable)
        with swapping(tree, outside):
            for _ in range(ATTEMPTS):
                results[attacker.attempt()] += 1
        assert SECRET not in attacker.got
        assert not attacker.inodes & forbidden
    assert state_of(outside) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "tree"]
    assert sum(results.values()) == ATTEMPTS
    assert len(results) > 20, "most attempts did nothing"
    assert bool(attacker.made) == is_writable
