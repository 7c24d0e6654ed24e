"""Conventions of the whole test tree: allowed skips, and checks for leaks.

- A test marked `kvm`, `guest` or `root` is skipped, with the reason, on a machine that lacks it.
  `VMD_REQUIRE=kvm,guest,root` turns each such skip into a failure.
- No test leaves a file descriptor, a child process, a thread or a logger's level behind.
- Property tests have no deadline: a busy machine is no defect.
- The end of the run counts the tests of each level.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import host

settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

LEVELS = ("unit", "kvm", "guest", "system")
_OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
_THREAD_GRACE_S = 2.0


@functools.cache
def _missing(need: str) -> str | None:
    probes: dict[str, Callable[[], str | None]] = {
        "kvm": host.missing_kvm,
        "guest": host.missing_guest_kvm,
        "root": host.missing_root,
    }
    return probes[need]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose needs are missing, or fail it if they are required."""
    required = os.environ.get("VMD_REQUIRE", "").split(",")
    for need in ("root", "kvm", "guest"):
        if item.get_closest_marker(need) is None:
            continue
        reason = _missing(need)
        if reason is None:
            continue
        if need in required:
            pytest.fail(f"VMD_REQUIRE has {need}, but {reason}", pytrace=False)
        pytest.skip(reason)


def level(item: pytest.Item) -> str:
    """Return the level that a test counts for: the most demanding of its needs."""
    if item.get_closest_marker("guest") is not None:
        return "guest"
    if item.get_closest_marker("kvm") is not None:
        return "kvm"
    return "system" if "system" in item.path.parts else "unit"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Note each test's level for the final count."""
    for item in items:
        item.user_properties.append(("level", level(item)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests of each level had each outcome."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in LEVELS}
    for outcome in _OUTCOMES:
        for report in terminalreporter.stats.get(outcome, []):
            if isinstance(report, pytest.TestReport):
                properties = dict(report.user_properties)
                counts[str(properties.get("level", "unit"))][outcome] += 1
    for name, outcomes in counts.items():
        if outcomes:
            told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
            terminalreporter.write_line(f"{name}: {told}")


def _open_files() -> dict[int, str]:
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:  # the descriptor of this listing itself
            continue
    return found


def _children() -> set[int]:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return set()
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


def _leaks(files: dict[int, str], children: set[int], threads: set[threading.Thread]) -> list[str]:
    leaked = [
        f"fd {fd}: {target}" for fd, target in _open_files().items() if files.get(fd) != target
    ]
    leaked += [f"child process {pid}" for pid in _children() - children]
    leaked += [f"thread {thread.name}" for thread in set(threading.enumerate()) - threads]
    return leaked


@pytest.fixture(autouse=True)
def leak_check() -> Iterator[None]:
    """Fail a test that leaves a file descriptor, a child process or a thread behind."""
    files, children, threads = _open_files(), _children(), set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - threads:
        thread.join(_THREAD_GRACE_S)
    if _leaks(files, children, threads):
        gc.collect()  # free objects in reference cycles, such as the frame of a raised exception
        leaked = _leaks(files, children, threads)
        if leaked:
            pytest.fail(f"left behind: {'; '.join(leaked)}", pytrace=False)


@pytest.fixture(autouse=True)
def levels_of_loggers() -> Iterator[None]:
    """Restore the level of every logger: programs set levels for their own process."""
    known = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    before = {logger: logger.level for logger in known}
    yield
    for name in (None, *logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.setLevel(before.get(logger, logging.NOTSET))
