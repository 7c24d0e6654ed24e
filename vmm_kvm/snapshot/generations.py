"""Detecting changes of disks since a machine was written down.

A guest's memory knows what is on its disks: with other contents, the guest damages them. So the
state of a written machine has a *generation* of each image, by which a change of the file shows.
A file with another number is taken for a copy, as on another host, and only its size is compared.
"""

import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vmm_kvm.errors import SnapshotError, StateError
from vmm_kvm.snapshot.state import State
from vmm_kvm.state import U64, Json, decode, encode

_PART = "image"


class Generation(NamedTuple):
    """In which state an image's file is."""

    size: U64
    """Bytes."""
    changed_ns: U64
    """When its contents were changed, in nanoseconds since 1970-01-01 UTC."""
    number: U64
    """Of its inode."""

    @classmethod
    def of(cls, fd: int) -> "Generation":
        """Return that of an open file.

        Raises:
            OSError: it cannot be asked.
        """
        status = os.fstat(fd)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


def with_generations(state: State, found: Mapping[int, Generation]) -> State:
    """Add generations to the state of a machine, by the places of the disks."""
    parts = {f"{_PART}{place}": encode(one)[0] for place, one in found.items()}
    return State({**state.parts, **parts}, state.blobs)


def take_generations(state: State, disks: int) -> tuple[State, dict[int, Generation]]:
    """Return a state without the generations of its disks, and these.

    Raises:
        SnapshotError: one is none.
    """
    parts: dict[str, dict[str, Json]] = dict(state.parts)
    found = {}
    for place in range(disks):
        name = f"{_PART}{place}"
        fields = parts.pop(name, None)
        if fields is not None:
            try:
                found[place] = decode(Generation, fields)
            except StateError as err:
                raise SnapshotError(f"{name}: {err}") from err
    return State(parts, state.blobs), found


def check_generations(
    paths: Iterable[str], wanted: Mapping[int, Generation], found: Mapping[int, Generation]
) -> None:
    """Refuse disks that have changed since.

    Raises:
        SnapshotError: the first of them, by its path.
    """
    for place, path in enumerate(paths):
        was, now = wanted.get(place), found.get(place)
        if was is None or now is None:
            continue
        if was.size != now.size or (was.number == now.number and was != now):
            raise SnapshotError(f"disk {path}: it has changed since the VM was written")
