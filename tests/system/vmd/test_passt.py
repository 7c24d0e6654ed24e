"""Networks of `vmd --user`: passt, or nothing."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.system.vmd.daemon import READY, Daemon, children, is_alive, process_title, vm_block

pytestmark = pytest.mark.kvm


def _passts(vmd: Daemon) -> list[int]:
    return [pid for pid in children(vmd.process.pid) if process_title(pid).startswith("passt")]


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_each_local_interface_has_a_passt(tmp_path: Path) -> None:
    """Each local interface has a passt from start to end, over reboots and the end of vmm."""
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
    """Without passt a VM starts all the same, with unplugged interfaces, and the log says why."""
    monkeypatch.setenv("PATH", str(tmp_path))
    config = vm_block("web", "local interface", "interface")
    with Daemon(tmp_path, config) as vmd, vmd.client() as client:
        assert client.ask("start", name="web")["type"] == "started"
        vmd.wait_for_log("vm/web: interface 0: no network: passt is not installed")
        vmd.wait_for_log("vm/web: interface 1: no network: switches need root")
        vms = client.ask("status", name="web", interfaces=True)["vms"]
        assert isinstance(vms, list)
        assert [one["is_up"] for one in vms[0]["interfaces"]] == [False, False]


def stays_offline() -> bool:
    """Tell whether this passt runs without a way out, as new ones do, in local mode."""
    program = shutil.which("passt")
    return program is not None and b" local mode" in Path(program).read_bytes()


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
@pytest.mark.root
def test_a_host_that_is_offline(tmp_path: Path) -> None:
    """Offline the guest runs; the log, an event and the status have passt's last message."""
    if stays_offline():
        pytest.skip("this passt does not end where there is no way out")
    config = vm_block("web", "local interface")
    offline = ("unshare", "--net")
    with (
        Daemon(tmp_path, config, prefix=offline) as vmd,
        vmd.client() as client,
        vmd.client() as listener,
    ):
        assert listener.ask("events")["type"] == "done"
        assert client.ask("start", name="web")["type"] == "started"
        vmd.wait_for_log("vm/web: interface 0: no network: passt has ended: ")
        vmd.wait_for_log("(is this host offline?)")
        while (event := listener.receive()[0])["kind"] != "interface":
            assert event["kind"] != "removed"
        assert "no network: passt has ended" in str(event["message"])
        vms = client.ask("status", name="web", interfaces=True)["vms"]
        assert isinstance(vms, list)
        (interface,) = vms[0]["interfaces"]
        assert not interface["is_up"]
        assert "is this host offline?" in interface["problem"]


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_a_port_that_somebody_has(tmp_path: Path) -> None:
    """The log and the status name a port in use; the guest runs without a network."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config = vm_block("web", f"local interface {{ forward tcp {port} to 80 }}")
        with Daemon(tmp_path, config) as vmd, vmd.client() as client:
            assert client.ask("start", name="web")["type"] == "started"
            why = f"tcp port {port} of 127.0.0.1: Address already in use"
            vmd.wait_for_log(f"vm/web: interface 0: no network: {why}")
            lines = client.ask("history", name="web")["lines"]
            assert isinstance(lines, list)
            assert any(why in line["text"] for line in lines)


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_a_passt_that_is_killed(tmp_path: Path) -> None:
    """If passt is killed the guest runs on without link; after a reboot it has another passt."""

    def is_up() -> object:
        vms = client.ask("status", name="web", interfaces=True)["vms"]
        assert isinstance(vms, list)
        return vms[0]["interfaces"][0]["is_up"]

    with Daemon(tmp_path, vm_block("web", "local interface")) as vmd, vmd.client() as client:
        started = client.ask("start", name="web")
        with client.console("web") as console:
            console.expect(READY)
            (passt,) = _passts(vmd)
            assert is_up()
            os.kill(passt, signal.SIGKILL)
            vmd.wait_for_log("vm/web: interface 0: no network: passt has ended")
            assert not is_up()
            console.type(b"r")
            console.read_to_end()
        client.wait_for_reboot("web", started["pid"])
        assert is_up()
        assert _passts(vmd) != [passt]
