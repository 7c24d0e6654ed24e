"""What the processes of a running daemon have: descriptors, users, capabilities, filters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.vmd.conftest import missing_separation
from tests.system.vmd.daemon import (
    READY,
    ROOT,
    Daemon,
    descendants,
    is_alive,
    process_title,
    vm_block,
)
from vmd.confine.sandbox import find_identity

pytestmark = pytest.mark.kvm

_NO_LANDLOCK = """
from vmd.confine import landlock
landlock.version = lambda: 0
import runpy
runpy.run_module('vmd', run_name='__main__', alter_sys=True)
"""
_LINE = "this kernel has no Landlock, or it is switched off: only system call filters"


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("is_user", [True, False], ids=["user", "root"])
def test_children_have_no_terminal(tmp_path: Path, is_user: bool) -> None:
    """Standard input and output of every child are /dev/null."""
    if not is_user and (reason := missing_separation()):
        pytest.skip(reason)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    config = vm_block("one", f'disk "{image}"')
    with Daemon(tmp_path, config, is_user=is_user) as vmd, vmd.client() as client:
        assert client.ask("start", name="one")["type"] == "started"
        titles = {}
        for pid in descendants(vmd.process.pid):
            title = process_title(pid)
            try:
                opened = [Path(f"/proc/{pid}/fd/{number}").readlink() for number in (0, 1)]
            except FileNotFoundError:  # it has ended meanwhile
                continue
            titles[title] = opened
        assert {"vm/one", "disk/one", "vmd: control", "vmd: vmm"} <= set(titles)
        assert set(map(tuple, titles.values())) == {(Path("/dev/null"),) * 2}


@pytest.mark.root
def test_no_child_is_root(tmp_path: Path) -> None:
    """Every child is a process of `_vmd`, and priv alone has a capability; all have filters."""
    if reason := missing_separation():
        pytest.skip(reason)
    uid = find_identity().uid
    with Daemon(tmp_path, vm_block("one"), is_user=False) as vmd, vmd.client() as client:
        assert client.ask("start", name="one")["type"] == "started"
        vmd.wait_for_child("vmd: zygote")
        vmd.wait_for_child("vmd: local")
        found = {
            process_title(pid): _status(pid)
            for pid in descendants(vmd.process.pid)
            if is_alive(pid)
        }
        assert _status(vmd.process.pid)["Seccomp"] == "2"
    for title, status in found.items():
        assert status["Uid"].split() == [str(uid)] * 4, title
        assert status["Seccomp"] == "2", title
        capabilities = 1 << 12 if title == "vmd: priv" else 0
        assert int(status["CapPrm"], 16) == int(status["CapBnd"], 16) == capabilities, title


def test_a_kernel_without_landlock_is_said_loudly(tmp_path: Path) -> None:
    """The log begins with it, `vmd -n` says it, and VMs start."""
    program = ("-c", _NO_LANDLOCK)
    with Daemon(tmp_path, vm_block("one"), program=program) as vmd, vmd.client() as client:
        assert client.ask("start", name="one")["type"] == "started"
        with client.console("one") as console:
            console.expect(READY)
        assert vmd.log.read_text().count(_LINE) == 1
        command = [sys.executable, *program, "-n", "--user", "-f", str(vmd.config)]
        told = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, check=True, text=True)
    assert f"vmd: {_LINE}" in told.stderr
