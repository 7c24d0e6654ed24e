"""Fixtures of the guest level: Debian's kernels, and QEMU's guests for comparison."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import artifacts
from tests.guest.linux_guest import Report, qemus


@pytest.fixture(params=list(artifacts.KERNELS))
def kernel(request: pytest.FixtureRequest) -> artifacts.Kernel:
    """Each of Debian's kernels in turn."""
    return artifacts.kernel(str(request.param))


@pytest.fixture
def cloud_kernel() -> artifacts.Kernel:
    """Debian 12's cloud kernel, for what does not depend on the kernel."""
    return artifacts.kernel("6.1-cloud")


@pytest.fixture(scope="session")
def qemu_report() -> Callable[[artifacts.Kernel, int, int], Report]:
    """Return what the guest reports under QEMU, by kernel, vCPUs and bytes of memory.

    Each is asked for once in a session. Complaints are those of `-M pc` and of `-M q35` together:
    a guest may complain of what either of QEMU's machines lacks too.
    """
    known: dict[tuple[str, int, int], Report] = {}

    def report(kernel: artifacts.Kernel, cpus: int, memory: int) -> Report:
        key = (kernel.name, cpus, memory)
        if key not in known:
            pc, q35 = (_report(kernel, machine, cpus, memory) for machine in ("pc", "q35"))
            known[key] = Report(
                release=pc.release,
                nproc=pc.nproc,
                memory=pc.memory,
                ram=pc.ram,
                complaints=pc.complaints | q35.complaints,
            )
        return known[key]

    return report


def _report(kernel: artifacts.Kernel, machine: str, cpus: int, memory: int) -> Report:
    with qemus(kernel, "report", machine=machine, cpus=cpus, memory=memory) as guest:
        guest.expect("report: end")
        assert guest.wait() == 0
        return Report.parse(guest.output.decode("latin-1"))
