"""Seeds of VMs with cloud-init: files that go when neither a VM nor a snapshot needs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.system.vmd.daemon import ROOT, SELFTEST, Daemon, vm_block, vmctl
from vmctl.client import Client

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
        assert vmctl(vmd, "start", *options, "--agent", "--save", "two").returncode == 0
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


def _disks(vmd: Daemon) -> list[str]:
    """Return the paths of the disks of the VM `web`."""
    with Client(str(vmd.socket)) as client:
        vms = (vm for vm in client.vms(devices=True) if vm["name"] == "web")
        return [disk["path"] for vm in vms for disk in vm["disks"]]


@pytest.mark.parametrize("is_user", [True, pytest.param(False, marks=pytest.mark.root)])
def test_seeds_of_the_configuration(tmp_path: Path, is_user: bool) -> None:
    """A VM of vm.conf has a new seed at each start, with the files as they are then."""
    key, user_data = tmp_path / "key.pub", tmp_path / "user-data"
    key.write_text(f"{KEY}\n")
    user_data.write_text("#cloud-config\nhostname: first\n")
    lines = f'ssh key "{key}"', f'cloud-init "{user_data}"'
    config = "".join(vm_block(name, *lines, memory="16M") for name in ("web", "db"))
    with Daemon(tmp_path, config, is_user=is_user) as vmd, vmd.client() as client:

        def seed() -> bytes:
            assert _disks(vmd) == [str(tmp_path / "state" / "web.seed")]
            return (tmp_path / "state" / "web.seed").read_bytes()

        assert vmctl(vmd, "start", "web").returncode == 0
        assert b"hostname: first" in seed()
        assert KEY.encode() in seed()
        assert vmctl(vmd, "snapshot", "web", "kept").returncode == 0
        user_data.write_text("#cloud-config\nhostname: second\n")
        assert vmctl(vmd, "reload").returncode == 0
        client.wait_for_state("web", "running")
        assert vmctl(vmd, "stop", "-fw", "web").returncode == 0
        assert vmctl(vmd, "start", "--from", "kept", "web").returncode == 0
        assert b"hostname: first" in seed()
        assert vmctl(vmd, "stop", "-fw", "web").returncode == 0
        assert vmctl(vmd, "start", "web").returncode == 0
        assert b"hostname: second" in seed()
        key.unlink()
        done = vmctl(vmd, "start", "db")
        assert done.returncode == 1
        assert f"seed: {key}: No such file or directory" in done.stderr
        assert client.vm("db")["state"] == "stopped"


def test_seeds_that_are_saved(tmp_path: Path) -> None:
    """`start --save` writes the words, with absolute paths; nothing is left of a bad seed."""
    key = tmp_path / "key.pub"
    key.write_text(f"{KEY}\n")
    given = ("-m", "16M", "-b", str(SELFTEST), "--save")
    with Daemon(tmp_path, f'include "{tmp_path}/vm.conf.d/*.conf"\n') as vmd:
        done = vmctl(vmd, "start", *given, "--ssh-key", "gone", "web")
        assert (done.returncode, done.stderr) == (1, "vmctl: gone: No such file or directory\n")
        assert not (tmp_path / "vm.conf.d").exists()
        relative = os.path.relpath(key, ROOT)  # where commands run here
        assert vmctl(vmd, "start", *given, "--ssh-key", relative, "web").returncode == 0
        text = (tmp_path / "vm.conf.d" / "web.conf").read_text()
        assert f'\tssh key "{key}"\n' in text
        assert _disks(vmd) == [str(tmp_path / "state" / "web.seed")]
