"""Seeds of VMs with cloud-init: files that go when neither a VM nor a snapshot needs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.system.vmd.daemon import Daemon, vmctl

pytestmark = pytest.mark.kvm

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFrikGGJGsPSsM+ivZDCFUk7O2IwRWV5TugyENb26I8z me@here"


def test_seeds_are_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stays for a running VM, for one of vm.conf, and for a snapshot; young ones stay too."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "own"))
    monkeypatch.setenv("VMCTL_IMAGES", str(tmp_path / "images"))
    seeds = tmp_path / "own" / "vmm-kvm" / "seeds"
    (tmp_path / "key.pub").write_text(f"{KEY}\n")
    config = f'include "{tmp_path}/vm.conf.d/*.conf"\n'

    def prune() -> int:
        """Have them pruned; returns how many are left."""
        for path in seeds.iterdir():
            os.utime(path, (1, 1))
        done = vmctl(vmd, "image", "prune")
        assert (done.returncode, done.stderr) == (0, "")
        return len(list(seeds.iterdir()))

    with Daemon(tmp_path, config) as vmd, vmd.client() as client:
        options = ("--selftest", "-m", "16M", "--ssh-key", str(tmp_path / "key.pub"))
        assert vmctl(vmd, "start", *options, "one").returncode == 0
        assert vmctl(vmd, "start", *options, "--save", "two").returncode == 0
        client.wait_for_state("two", "running")
        assert prune() == 2
        assert vmctl(vmd, "snapshot", "one", "kept").returncode == 0
        assert vmctl(vmd, "stop", "-fw", "one").returncode == 0
        assert vmctl(vmd, "stop", "-fw", "two").returncode == 0
        assert prune() == 2
        assert vmctl(vmd, "snapshot", "-r", "kept").returncode == 0
        assert vmctl(vmd, "image", "prune").returncode == 0
        assert prune() == 1
        (tmp_path / "vm.conf.d" / "two.conf").unlink()
        assert vmctl(vmd, "reload").returncode == 0
        (left,) = seeds.iterdir()
        left.touch()
        assert vmctl(vmd, "image", "prune").stdout == "0B freed\n"
        assert left.exists()
        assert prune() == 0
        assert vmctl(vmd, "start", *options, "three").returncode == 0
    for path in seeds.iterdir():
        os.utime(path, (1, 1))
    done = vmctl(vmd, "image", "prune")
    assert (done.returncode, done.stdout) == (0, "0B freed\n")
    assert done.stderr.startswith("vmctl: seeds of cloud-init stay: vmd does not tell which")
    assert len(list(seeds.iterdir())) == 1
