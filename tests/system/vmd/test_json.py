"""Output of `--json` from a running daemon, checked by the schemas of docs/schemas."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests.json_schema import problems
from tests.system.vmd.daemon import ROOT, SELFTEST, TIMEOUT_S, Daemon, vm_block, vmctl

pytestmark = pytest.mark.kvm


def test_what_is_printed_fits(tmp_path: Path) -> None:
    """VMs that run, have ended or are gone, with disks, and what happens to them meanwhile."""
    status, events = (
        json.loads((ROOT / "docs" / "schemas" / f"{verb}.json").read_text())
        for verb in ("status", "events")
    )
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    config = vm_block("web", f'disk "{disk}" format raw') + vm_block("other")
    with (
        Daemon(tmp_path, config) as vmd,
        vmd.client() as client,
        subprocess.Popen(
            [sys.executable, "-m", "vmctl", "events", "--json"],
            cwd=ROOT,
            env={**os.environ, "VMD_SOCKET": str(vmd.socket)},
            stdout=subprocess.PIPE,
        ) as listening,
    ):
        assert listening.stdout
        made = vmctl(vmd, "start", "-b", str(SELFTEST), "-m", "64M", "new")
        assert made.returncode == 0, made.stderr
        client.ask("start", name="web")
        # The command may not listen yet when the first things happen.
        while not select.select([listening.stdout], [], [], 0.1)[0]:
            client.ask("pause", name="web")
            client.ask("unpause", name="web")
        client.ask("stop", name="new", force=True, wait=True)
        for words in (("status",), ("status", "-a"), ("show", "web"), ("show", "new")):
            told = json.loads(vmctl(vmd, *words, "--json").stdout)
            assert told
            assert list(problems(told, status, status)) == [], words
        seen: list[dict[str, object]] = []
        while not seen or (seen[-1]["name"], seen[-1]["kind"]) != ("new", "stopped"):
            event = json.loads(listening.stdout.readline())
            assert list(problems(event, events, events)) == []
            seen.append(event)
        listening.terminate()
        listening.wait(TIMEOUT_S)
