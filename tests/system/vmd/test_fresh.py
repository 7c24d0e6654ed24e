"""Zygotes with address layouts of their own: `vmd --zygotes`."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.system.vmd.conftest import each_daemon
from tests.system.vmd.daemon import Daemon, children, process_title, vm_block

pytestmark = pytest.mark.kvm

_VMS = ("one", "two", "three", "four")


def _base(pid: int) -> int:
    """Return the address of the C library in a process."""
    text = Path(f"/proc/{pid}/maps").read_text()
    found = re.search(r"^([0-9a-f]+)-.*/libc\.so\.6$", text, re.MULTILINE)
    assert found
    return int(found[1], 16)


def _zygotes(vmd: Daemon) -> set[int]:
    vmm = vmd.child("vmd: vmm")
    return {pid for pid in children(vmm) if process_title(pid) == "vmd: zygote"}


@each_daemon
def test_layouts(tmp_path: Path, *, is_user: bool) -> None:
    """VMs are spread over zygotes, whose layouts differ from all others, and start and end."""
    config = "".join(vm_block(name, memory="4M") for name in _VMS)
    with Daemon(tmp_path, config, is_user=is_user, options=("--zygotes", "2")) as vmd:
        with vmd.client() as client:
            for name in _VMS:
                assert client.ask("start", name=name)["type"] == "started"
            pids = {name: client.vm(name)["pid"] for name in _VMS}
            bases = [_base(pid) for pid in pids.values() if isinstance(pid, int)]
            assert bases[0] == bases[2]
            assert bases[1] == bases[3]
            others = {_base(vmd.process.pid), _base(vmd.child("vmd: vmm"))}
            assert len({bases[0], bases[1], *others}) == 3
            assert {_base(pid) for pid in _zygotes(vmd)} == {bases[0], bases[1]}
            stopped = client.ask("stop", name="two", force=True, wait=True)
            assert stopped["type"] == "terminated"
            assert client.vm("one")["pid"] == pids["one"]
        os.kill(next(iter(_zygotes(vmd))), signal.SIGKILL)
        vmd.wait_for_log("the zygote has ended")
        with vmd.client() as client:
            for name in _VMS:
                client.wait_for_state(name, "stopped")
            assert client.ask("start", name="four")["type"] == "started"
