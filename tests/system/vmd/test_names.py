"""Files whose names are no UTF-8, under a real daemon: in vm.conf, and named by clients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.vmd.daemon import READY, ROOT, SELFTEST, Daemon, vm_block

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]
RAW = b"k\xff\x80rnel"


@pytest.fixture
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a boot image and disks of such names."""
    folder = tmp_path_factory.mktemp("names")
    for name, data in ((RAW, SELFTEST.read_bytes()), (b"d\xfe", bytes(1 << 20))):
        (folder / os.fsdecode(name)).write_bytes(data)
    return folder


def test_files_of_the_configuration(start_vmd: Start, named: Path) -> None:
    """A VM of vm.conf runs with such files, its disk in a process; messages escape the names."""
    disk, boot = named / os.fsdecode(b"d\xfe"), named / os.fsdecode(RAW)
    missing = named / os.fsdecode(b"m\xff")
    config = (
        vm_block("one", f'disk "{disk}" format raw', boot=boot)
        + vm_block("probed", f'disk "{disk}"', boot=boot)
        + vm_block("two", f'disk "{missing}"')
    )
    missing.write_bytes(bytes(1 << 20))
    with start_vmd(config) as vmd, vmd.client() as client:
        missing.unlink()
        for name in ("one", "probed"):
            started = client.ask("start", name=name)
            assert started["type"] == "started", started
            with client.console(name) as console:
                console.expect(READY)
            assert client.ask("stop", name=name, force=True, wait=True)["type"] == "terminated"
        failed = client.ask("start", name="two")
        assert failed["message"] == f"disk {named}/m\\xff: No such file or directory"
        log = vmd.log.read_text()
    assert f"disk {named}/m\\xff" in log
    assert "Traceback" not in log


def test_files_of_vmctl(start_vmd: Start, named: Path) -> None:
    """`vmctl start` passes such files open, and reports a faulty one in a line."""
    with start_vmd("") as vmd:
        vmctl: list[str | Path] = [sys.executable, "-m", "vmctl", "start"]
        options: list[str | Path] = [
            "-b",
            named / os.fsdecode(RAW),
            "-d",
            named / os.fsdecode(b"d\xfe"),
            "-m",
            "64M",
        ]
        environ = {**os.environ, "VMD_SOCKET": str(vmd.socket)}
        ended = subprocess.run(
            [*vmctl, *options, "mine"], cwd=ROOT, env=environ, capture_output=True, check=False
        )
        assert (ended.returncode, ended.stdout) == (0, b""), ended
        with vmd.client() as client:
            client.wait_for_state("mine", "running")
        refused = subprocess.run(
            [*vmctl, "-d", named / os.fsdecode(b"m\xff"), "-m", "64M", "other"],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            check=False,
        )
        assert refused.returncode == 1
        expected = f"vmctl: invalid disk path: {named}/m\\xff: No such file or directory\n"
        assert refused.stderr.decode() == expected
