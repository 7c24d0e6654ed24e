"""Processes that are forked for a parent, in a pid namespace and without one."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from vmd.confine.namespaces import number_children_anew
from vmd.shared.siblings import fork_sibling

STATUS = 7


def _forked(body: Callable[[], int]) -> int:
    """Run `body` in a child, which exits with its result; returns the child's pid."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            faulthandler.disable()
            status = body()
        finally:
            os._exit(status)
    return pid


def _live() -> int:
    """Do a process's usual work: threads, memory, handlers."""
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(threading.get_native_id()))
    thread.start()
    thread.join()
    assert done != [os.getpid()]
    assert threading.main_thread() is threading.current_thread()
    assert threading.get_native_id() == os.getpid()
    signal.signal(signal.SIGUSR1, lambda *_: done.append(0))
    signal.raise_signal(signal.SIGUSR1)
    assert len(done) == 2
    return STATUS


def _sibling(body: Callable[[], int]) -> int:
    if fork_sibling() == 0:
        status = 99
        try:
            status = body()
        finally:
            os._exit(status)
    return 0


def _ends() -> list[int]:
    """Wait for all children; returns their ends, in numerical order."""
    found = []
    while True:
        try:
            found.append(os.waitstatus_to_exitcode(os.wait()[1]))
        except ChildProcessError:
            return sorted(found)


def test_a_sibling_is_our_child() -> None:
    """A process that our child forks as a sibling is reaped by us, and works as usual."""
    _forked(lambda: _sibling(_live))
    assert _ends() == [0, STATUS]


def test_a_sibling_may_abort() -> None:
    """An assertion of the C library ends a sibling."""

    def abort() -> int:
        os.abort()

    _forked(lambda: _sibling(abort))
    assert _ends() == [-signal.SIGABRT, 0]


def test_no_sibling_of_the_zygote_repeats_random_numbers() -> None:
    """The zygote has no module that has to be told of a fork: `random` would be one."""
    program = """
import sys
from importlib import import_module
from vmd import children
from vmd.device import disk, nic
from vmd.vm import process
from vmd.zygote import process
from vmd.zygote.warm import gathering, immortal, packing, rehearsal
for name in children._LATE_MODULES:
    import_module(name)
print(*{"random", "concurrent.futures.thread", "multiprocessing.util"} & set(sys.modules))
"""
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert found.stdout == "\n"


@pytest.mark.root
def test_a_sibling_in_a_pid_namespace() -> None:
    """In its pid namespace it has a number of its own; its parent, which is us, has none."""

    def numbers() -> int:
        assert os.getppid() == 0
        return os.getpid()

    def vmm() -> int:
        number_children_anew()
        first = _forked(lambda: signal.sigwait({signal.SIGUSR1}) and 0 if os.getpid() == 1 else 99)
        _forked(lambda: _sibling(numbers))
        ends = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)]
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        return sum(ends)  # the first of these exits with 0, the other with its number, 3

    _forked(vmm)
    assert _ends() == [3]
