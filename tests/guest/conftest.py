"""Fixtures of the guest level: Debian's kernels, and QEMU's guests for comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests import artifacts
from tests.guest.core import CORE
from tests.guest.linux_guest import MIB, Report, qemus


@pytest.fixture(params=artifacts.distinct_kernels())
def kernel(request: pytest.FixtureRequest) -> artifacts.Kernel:
    """Each of Debian's kernels in turn."""
    return artifacts.kernel(str(request.param))


@pytest.fixture
def cloud_kernel() -> artifacts.Kernel:
    """The older cloud kernel, for tests that do not depend on the kernel."""
    return artifacts.kernel("cloud")


@pytest.fixture(scope="session")
def qemu_report() -> Callable[[artifacts.Kernel], Report]:
    """Return the report of a guest of two vCPUs and 256 MiB under QEMU, by kernel.

    Each is made once in a session. It has the complaints of `-M pc` and of `-M q35` together: a
    guest may complain of a part that either of QEMU's machines lacks too.
    """
    known: dict[str, Report] = {}

    def report(kernel: artifacts.Kernel) -> Report:
        if kernel.name not in known:
            pc, q35 = (_report(kernel, machine) for machine in ("pc", "q35"))
            known[kernel.name] = replace(pc, complaints=pc.complaints | q35.complaints)
        return known[kernel.name]

    return report


def _report(kernel: artifacts.Kernel, machine: str) -> Report:
    with qemus(kernel, "report", machine=machine, cpus=2, memory=256 * MIB) as guest:
        guest.expect("report: end")
        assert guest.wait() == 0
        return Report.parse(guest.output.decode("latin-1"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `CORE`, before any is deselected for its markers."""
    for item in items:
        if item.nodeid.removeprefix("tests/guest/") in CORE:
            item.add_marker("core")
