"""Measure the FUSE server of a share alone: its processor time for each kind of request.

At the root of the tree: `python -m bench.share [FOLDER]`. Files are made in a folder below FOLDER,
by default in memory, so that the host's file system costs little. The client of the tests is in
this process, and its time does not count: no guest, no queue, no second process.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.fuse_client import FuseClient

ROUNDS = 5
FILES = 1000
MIB = 1 << 20
SIZE = 16 * MIB
_SMALL = 4096


class TimedClient(FuseClient):
    """A client that measures the time of its server."""

    spent = 0.0

    def _ask(self, request: bytes, data: bytes, room: int) -> bytes:
        space = bytearray(room)
        views = [memoryview(data)] if data else [], [memoryview(space)] if room else []
        began = time.thread_time()
        try:
            answer = self.server.answer(request, *views)
        finally:
            self.spent += time.thread_time() - began
        if answer is None:
            return b""
        return bytes(space[:answer]) if isinstance(answer, int) else answer


def measured(client: TimedClient, count: int, call: Callable[[int], object]) -> float:
    """Return the microseconds of the server for each of `count` calls, in the best round."""
    best = float("inf")
    for _ in range(ROUNDS):
        client.spent = 0.0
        for number in range(count):
            call(number)
        best = min(best, client.spent / count)
    return best * 1e6


def measure(folder: Path) -> None:
    """Print a line for each kind of request."""
    for number in range(FILES):
        (folder / f"n{number}").touch()
    (folder / "large").write_bytes(os.urandom(SIZE))
    data = os.urandom(MIB)
    with TimedClient(folder) as client:
        node = client.look_up(b"large").node
        handle = client.open(node)
        _found, written = client.create(b"written")

        def make(number: int) -> None:
            client.release(client.create(b"c%d" % number)[1])
            client.unlink(b"c%d" % number)

        for name, count, call in (
            ("LOOKUP", FILES, lambda number: client.look_up(b"n%d" % number)),
            ("GETATTR", FILES, lambda _: client.attributes(node)),
            ("OPEN, RELEASE", FILES, lambda _: client.release(client.open(node))),
            ("READ, 4 KiB", FILES, lambda at: client.read(handle, at * _SMALL, _SMALL)),
            ("READ, 1 MiB", SIZE // MIB, lambda at: client.read(handle, at * MIB, MIB)),
            ("WRITE, 1 MiB", SIZE // MIB, lambda at: client.write(written, data, at * MIB)),
            ("CREATE, RELEASE, UNLINK", FILES, make),
        ):
            print(f"{name}: {measured(client, count, call):.0f} us")
        listing = measured(client, 1, lambda _: client.listing(plus=True))
        print(f"READDIRPLUS, for each entry: {listing / FILES:.0f} us")


def main() -> None:
    """Measure in a folder of its own."""
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else "/dev/shm"))
    try:
        measure(folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
