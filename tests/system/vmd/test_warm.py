"""Warming up is optional: VMs start without it, after any failure in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.vmd.conftest import missing_separation
from tests.system.vmd.daemon import READY, Daemon, vm_block

pytestmark = pytest.mark.kvm

_RAISES = """
from vmd.zygote.warm import entry, rehearsal
import sys
def gather(recorder, writes_tuples):
    raise RuntimeError("boom")
rehearsal.gather = gather
entry.GATHERING_VERSIONS = {sys.version_info[:2]}
"""
_UNKNOWN = """
from vmd.zygote.warm import entry
entry.GATHERING_VERSIONS = frozenset()
"""
_HANGS = """
import time
from vmd import children
from vmd.zygote.warm import rehearsal
def play(*arguments, **named):
    time.sleep(1000)
children.WARMING_PATIENCE_S = 1.0
rehearsal.Rehearsal.play = play
"""
_READY_ONE_HANGS = """
import time
from vmd.vm import process
from vmd.vmm import blanks
def rehearse(*_arguments, **_named):
    time.sleep(1000)
process.rehearse = rehearse
blanks.SPARE_PATIENCE_NS = 1_000_000_000
"""
_READY_ONE_FAILS = """
from vmd.vm import process, rehearsing
def make(*arguments, **named):
    raise RuntimeError("boom")
def rehearse(*arguments, rehearse=process.rehearse, **named):
    machine, rehearsing.Machine = rehearsing.Machine, make
    try:
        rehearse(*arguments, **named)
    finally:
        rehearsing.Machine = machine
process.rehearse = rehearse
"""
_RUN = "import runpy; runpy.run_module('vmd', run_name='__main__', alter_sys=True)"
_COLD = "zygote: not warmed up, so each VM costs more memory: "


@pytest.mark.parametrize(
    ("environ", "patch", "line"),
    [
        ({"VMD_WARM": "off"}, "", None),
        ({"VMD_WARM": "all"}, "", None),
        ({"VMD_WARM": "rehearse", "PYTHONMALLOC": "malloc"}, "", None),
        ({}, _RAISES, f"{_COLD}RuntimeError: boom"),
        ({}, _UNKNOWN, "zygote: no objects are gathered: not tested on "),
        ({}, _HANGS, f"{_COLD}not done in 1 seconds"),
        ({}, _READY_ONE_HANGS, "vmm: the vm process made ahead is not ready: killed"),
        ({}, _READY_ONE_FAILS, "vm: not rehearsed, so VMs start more slowly: RuntimeError: boom"),
    ],
    ids=[
        "off",
        "all",
        "malloc",
        "raises",
        "unknown",
        "hangs",
        "ready one hangs",
        "ready one fails",
    ],
)
def test_vms_start(tmp_path: Path, environ: dict[str, str], patch: str, line: str | None) -> None:
    """VMs start before and after one log line about the missing warm-up."""
    config = vm_block("one", enabled=True) + vm_block("two")
    program = ("-c", f"{patch}\n{_RUN}")
    with (
        Daemon(tmp_path, config, environ=environ, program=program) as vmd,
        vmd.client() as client,
    ):
        client.wait_for_state("one", "running")
        if line:
            vmd.wait_for_log(line)
        vmd.wait_for_child("vm")  # it is ready, or will be
        assert client.ask("start", name="two")["type"] == "started"
        for name in ("one", "two"):
            with client.console(name) as console:
                console.expect(READY)
        log = vmd.log.read_text()
    warnings = [text for text in log.splitlines() if "warm" in text or "ready" in text]
    if line:
        assert log.count(line) == 1
    else:
        assert warnings == []
    assert "bug" not in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("patch", "line"),
    [(_RAISES, f"{_COLD}RuntimeError: boom"), (_HANGS, f"{_COLD}not done in 1 seconds")],
    ids=["raises", "hangs"],
)
@pytest.mark.root
def test_vms_of_root_start(tmp_path: Path, patch: str, line: str) -> None:
    """The same where the process that fails is another user's already."""
    if reason := missing_separation():
        pytest.skip(reason)
    program = ("-c", f"{patch}\n{_RUN}")
    with (
        Daemon(tmp_path, vm_block("one"), is_user=False, program=program) as vmd,
        vmd.client() as client,
    ):
        vmd.wait_for_log(line)
        assert client.ask("start", name="one")["type"] == "started"
        with client.console("one") as console:
            console.expect(READY)
        assert "Traceback" not in vmd.log.read_text()


def test_an_unknown_warmth_is_an_error(tmp_path: Path) -> None:
    """The daemon does not start with an unknown value, and says so in one line."""
    with pytest.raises(
        AssertionError, match=r"vmd: VMD_WARM: 'hot' is none of off, rehearse, all\n$"
    ):
        Daemon(tmp_path, "", environ={"VMD_WARM": "hot"})
