"""Measure the opening of a client's file in a process of its own: processor time and wall time.

As root, at the root of the tree: `python -m bench.openers [COUNT]`.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from tempfile import NamedTemporaryFile

from vmd.children import opener_plan
from vmd.config.disks import DiskKind
from vmd.shared.privsep import spawn
from vmd.wire.channel import Channel
from vmd.wire.files import PARENT_AND_OPENER, FileUse, OpenFiles, WantedFile

USER = 65534
SIZE = 1 << 20


def _open_once(path: str) -> float:
    """Have a disk opened, locked and probed; returns the milliseconds until the answer."""
    wanted = WantedFile(use=FileUse.DISK, path=path, writes=True, format=DiskKind.PROBE)
    began = time.perf_counter()
    child = spawn(opener_plan(USER))
    with Channel(child.connection, PARENT_AND_OPENER) as channel:
        channel.send(OpenFiles(files=(wanted,)))
        channel.wait().fds.close()
        took = time.perf_counter() - began
    os.waitpid(child.pid, 0)
    return took * 1000


def main() -> None:
    """Open a file `COUNT` times, and print the time of one."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with NamedTemporaryFile() as file:
        file.truncate(SIZE)
        os.fchmod(file.fileno(), 0o666)
        _open_once(file.name)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        times = [_open_once(file.name) for _ in range(count)]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"wall {statistics.median(times):.1f} ms, processor {used * 1000 / count:.1f} ms")


if __name__ == "__main__":
    main()
