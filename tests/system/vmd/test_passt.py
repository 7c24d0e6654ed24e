"""Networks of `vmd --user`: passt, or nothing."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.system.vmd.daemon import READY, Daemon, children, is_alive, process_title, vm_block

pytestmark = pytest.mark.kvm


def _passts(vmd: Daemon) -> list[int]:
    return [pid for pid in children(vmd.process.pid) if process_title(pid).startswith("passt")]


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_each_local_interface_has_a_passt(tmp_path: Path) -> None:
    """It is there from the start to the end, over reboots and the end of vmm, and not after."""
    config = 'switch "lan" { interface br0 }\n' + vm_block(
        "web",
        "local interface",
        "local interface {\nforward tcp 58080 to 80\n}",
        'interface { switch "lan" }',
    )

    def links() -> list[bool]:
        vms = client.ask("status", name="web", interfaces=True)["vms"]
        assert isinstance(vms, list)
        return [one["is_up"] for one in vms[0]["interfaces"]]

    with Daemon(tmp_path, config) as vmd, vmd.client() as client:
        vmd.wait_for_log("no switches: they need root")
        started = client.ask("start", name="web")
        assert started["type"] == "started"
        passts = _passts(vmd)
        assert len(passts) == 2
        assert links() == [True, True, False]
        vmd.config.write_text(config.replace("local interface\n", "local interface down\n", 1))
        assert client.ask("reload")["type"] == "done"
        assert links() == [False, True, False]
        with client.console("web") as console:
            console.expect(READY)
            console.type(b"r")
            console.read_to_end()
        deadline = time.monotonic() + 30
        while client.vm("web")["pid"] in {started["pid"], None}:
            assert time.monotonic() < deadline
        assert _passts(vmd) == passts
        os.kill(vmd.child("vmd: vmm"), signal.SIGKILL)
        client.wait_for_state("web", "stopped")
        while any(map(is_alive, passts)):
            assert time.monotonic() < deadline + 30
        assert client.ask("start", name="web")["type"] == "started"
        assert len(_passts(vmd)) == 2
        assert client.ask("stop", name="web", force=True, wait=True)["type"] == "terminated"
        assert vmd.stop() == 0


def test_without_passt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM starts all the same, with interfaces that lead nowhere, and the log says why."""
    monkeypatch.setenv("PATH", str(tmp_path))
    config = vm_block("web", "local interface", "interface")
    with Daemon(tmp_path, config) as vmd, vmd.client() as client:
        assert client.ask("start", name="web")["type"] == "started"
        vmd.wait_for_log("vm/web: interface 0: no network: passt is not installed")
        vmd.wait_for_log("vm/web: interface 1: no network: switches need root")
        vms = client.ask("status", name="web", interfaces=True)["vms"]
        assert isinstance(vms, list)
        assert [one["is_up"] for one in vms[0]["interfaces"]] == [False, False]
