"""The process that moves a VM's frames without vhost-net: its rights, and its end."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import Daemon, vm_block
from tests.system.vmd.netns import Namespace

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.root,
    needs_separation,
    pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="there is no /dev/net/tun"),
    pytest.mark.skipif(Path("/dev/vhost-net").exists(), reason="vhost-net needs no process"),
]

TIMEOUT_S = 20.0


def movers(name: str) -> list[int]:
    """Return the processes of a VM's interfaces."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if entry.read_text() == f"nic/{name}\n":
                found.append(int(entry.parent.name))
    return found


def test_a_vm_lives_on_without_it(tmp_path: Path) -> None:
    """Each interface has a process with a tap's queue and no user; a VM runs on without it."""
    config = vm_block("nicvm", "interface", "interface")
    with (
        Namespace() as space,
        Daemon(tmp_path, config, is_user=False, prefix=space.prefix) as vmd,
        vmd.client() as client,
    ):
        assert client.ask("start", name="nicvm")["type"] == "started"
        client.wait_for_state("nicvm", "running")
        with client.console("nicvm") as console:
            console.expect(b"selftest: ready")  # the machine is built: both are ready
        pids = movers("nicvm")
        assert len(pids) == 2
        taps = []
        for pid in pids:
            status = Path(f"/proc/{pid}/status").read_text()
            assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
            assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)
            for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
                taps += re.findall(r"^iff:\s+(\S+)$", entry.read_text(), re.MULTILINE)
        assert sorted(taps) == ["tap0", "tap1"]
        os.kill(pids[0], signal.SIGKILL)
        vmd.wait_for_log("its process was killed by signal 9")
        assert client.vm("nicvm")["state"] == "running"
        assert client.ask("stop", name="nicvm", force=True, wait=True)["type"] == "terminated"
        deadline = time.monotonic() + TIMEOUT_S
        while movers("nicvm"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        space.wait_for_links({"lo"})
