"""Memory balloons of the daemon's VMs: shown in the statistics, and sent along."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.vmd.daemon import Daemon, vm_block, vmctl
from tests.system.vmd.test_send import receive_from, send_to

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]


def given_back(vmd: Daemon) -> dict[str, int | None]:
    """Return the memory that each VM has given back; None for a VM without balloon."""
    done = vmctl(vmd, "top", "-d", "0.1", "-n", "1", "--json")
    rows = json.loads(done.stdout)
    assert all(row["guest_memory"] is None for row in rows), "this guest has no driver"
    return {row["name"]: row["given_back"] for row in rows}


def test_balloons(start_vmd: Start, tmp_path: Path) -> None:
    """vm.conf and an option give a balloon; clones and received VMs keep it, others have none."""
    config = vm_block("with", "balloon", enabled=True) + vm_block("without", enabled=True)
    with start_vmd(config) as vmd, vmd.client() as client:
        for name in ("with", "without"):
            client.wait_for_state(name, "running")
        assert vmctl(vmd, "start", "--selftest", "--balloon", "-m", "16M", "own").returncode == 0
        assert vmctl(vmd, "clone", "with", "copy").returncode == 0
        assert given_back(vmd) == {"with": 0, "without": None, "own": 0, "copy": 0}
        assert send_to(tmp_path / "sent", vmd, "with").returncode == 0
        done = receive_from(tmp_path / "sent", vmd, "again")
        assert done.returncode == 0, done.stderr
        assert given_back(vmd) == {"without": None, "own": 0, "copy": 0, "again": 0}
