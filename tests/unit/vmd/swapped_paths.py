"""Names in a user's directory whose target changes again and again: the steps of a change.

Each function makes a name, and steps that a process repeats as fast as it can. By that name an
opener may open files of the user, and never files of root.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import partial

from tests.unit.vmd.hostile_paths import USER, Tree
from vmm_kvm.libc import LIBC

Step = Callable[[], None]
Swap = Callable[[Tree], tuple[str, Sequence[Step]]]

_MS_BIND, _MNT_DETACH = 0x1000, 2
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def symbolic_links(tree: Tree) -> tuple[str, Sequence[Step]]:
    """Return a link to the user's file, root's, a FIFO, memory of a process, in turn."""
    name = tree.root / "name"
    targets = (tree.file("own"), tree.file("secret", owner=0), str(tree.root / "fifo"))

    def step(target: str) -> None:
        (tree.root / "next").symlink_to(target)
        (tree.root / "next").rename(name)

    return str(name), [partial(step, target) for target in (*targets, "/proc/self/mem")]


def hard_links(tree: Tree) -> tuple[str, Sequence[Step]]:
    """Return a name of the user's file, then of root's and of the FIFO."""
    name = tree.root / "name"
    targets = (tree.file("own"), tree.file("secret", owner=0), str(tree.root / "fifo"))

    def step(target: str) -> None:
        (tree.root / "next").hardlink_to(target)
        (tree.root / "next").rename(name)

    return str(name), [partial(step, target) for target in targets]


def deleted_files(tree: Tree) -> tuple[str, Sequence[Step]]:
    """Return a name whose file is deleted, and another made: the user's and root's in turn."""

    def step(owner: int) -> None:
        tree.file("name", owner=owner)
        (tree.root / "name").unlink()

    return str(tree.root / "name"), [partial(step, owner) for owner in (USER, 0)]


def bind_mounts(tree: Tree) -> tuple[str, Sequence[Step]]:
    """Return the user's file, over which root's and the FIFO are mounted in turn."""
    name = tree.file("name").encode()
    tree.mounts.append(tree.root / "name")
    _mount(tree.file("own").encode(), name)  # `Tree.close` unmounts it, in any case

    def step(target: str) -> None:
        _mount(target.encode(), name)
        _checked(LIBC.umount2(name, _MNT_DETACH))

    targets = (tree.file("secret", owner=0), str(tree.root / "fifo"))
    return name.decode(), [partial(step, target) for target in targets]


def directories(tree: Tree) -> tuple[str, Sequence[Step]]:
    """Return a file in a directory that is exchanged with one of root's, which is closed."""
    for directory, mode, owner in (("home", 0o755, USER), ("closed", 0o700, 0)):
        (tree.root / directory).mkdir(mode)
        tree.file(f"{directory}/file", 0o666, owner)
    places = [str(tree.root / directory).encode() for directory in ("home", "closed")]

    def step() -> None:
        exchange = (_AT_FDCWD, places[0], _AT_FDCWD, places[1], _RENAME_EXCHANGE)
        _checked(LIBC.renameat2(*exchange))

    return str(tree.root / "home" / "file"), [step]


SWAPS: tuple[Swap, ...] = (symbolic_links, hard_links, deleted_files, bind_mounts, directories)


def _mount(source: bytes, target: bytes) -> None:
    _checked(LIBC.mount(source, target, None, ctypes.c_ulong(_MS_BIND), None))


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
