"""`vmctl start --save`: a VM becomes a part of the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.vmd.daemon import SELFTEST, Daemon, vm_block, vmctl

pytestmark = pytest.mark.kvm


def test_a_vm_that_is_saved(tmp_path: Path) -> None:
    """A saved VM runs, stays when it ends, and is there unchanged after a restart of the daemon."""
    config = f'include "{tmp_path}/vm.conf.d/*.conf"\n'
    disk = tmp_path / "a disk.img"
    disk.write_bytes(bytes(1 << 20))
    given = ("-m", "64M", "-b", str(SELFTEST), "-d", f"raw:{disk},serial=x")
    with Daemon(tmp_path, config) as vmd, vmd.client() as client:
        done = vmctl(vmd, "start", "--save", *given, "-i", "1", "web")
        assert done.returncode == 0, done.stderr
        before = client.ask("status", name="web", devices=True, interfaces=True)["vms"]
        assert client.ask("stop", name="web", force=True, wait=True)["type"] == "terminated"
        assert client.vm("web")["state"] == "stopped"
        again = vmctl(vmd, "start", "--save", *given, "web")
        assert again.returncode == 1
        assert "there is a VM web already" in again.stderr
        assert vmctl(vmd, "list").stdout == "web\n"
        assert vmctl(vmd, "list", "-r").stdout == ""
    assert [path.name for path in (tmp_path / "vm.conf.d").iterdir()] == ["web.conf"]
    with Daemon(tmp_path, config) as vmd, vmd.client() as client:
        client.wait_for_state("web", "running")
        after = client.ask("status", name="web", devices=True, interfaces=True)["vms"]
        assert isinstance(before, list)
        assert isinstance(after, list)
        for what in ("boot", "append", "disks", "memory", "interfaces"):
            assert after[0][what] == before[0][what], what


def test_a_configuration_that_does_not_include_it(tmp_path: Path) -> None:
    """The error names the missing include line; nothing is made and nothing starts."""
    with Daemon(tmp_path, vm_block("other")) as vmd, vmd.client() as client:
        done = vmctl(vmd, "start", "--save", "-b", str(SELFTEST), "web")
        assert done.returncode == 1
        wanted = f'add the line: include "{tmp_path}/vm.conf.d/*.conf"'
        assert wanted in done.stderr
        assert not (tmp_path / "vm.conf.d").exists()
        assert [vm["name"] for vm in client.vms()] == ["other"]


def test_a_file_that_the_daemon_refuses(tmp_path: Path) -> None:
    """A file that the daemon refuses is removed again; the error has its file and line."""
    config = f'include "{tmp_path}/vm.conf.d/*.conf"\n'
    with Daemon(tmp_path, config) as vmd, vmd.client() as client:
        done = vmctl(vmd, "start", "--save", "-t", "nobody", "-b", str(SELFTEST), "web")
        assert done.returncode == 1
        assert 'web.conf:4: vm "web" failed: no VM "nobody"' in done.stderr
        assert list((tmp_path / "vm.conf.d").iterdir()) == []
        assert client.vms() == []


@pytest.mark.parametrize("obstacle", ["file", "directory"])
def test_a_file_that_cannot_be_written(tmp_path: Path, obstacle: str) -> None:
    """An existing file stays, and a path that is no directory is reported."""
    config = f'include "{tmp_path}/vm.conf.d/*.conf"\n'
    directory = tmp_path / "vm.conf.d"
    with Daemon(tmp_path, config) as vmd, vmd.client() as client:
        if obstacle == "file":
            directory.mkdir()
            (directory / "web.conf").write_text("# mine\n")
        else:
            directory.write_text("")
        done = vmctl(vmd, "start", "--save", "-b", str(SELFTEST), "web")
        assert done.returncode == 1
        assert f"{directory}/web.conf: File exists" in done.stderr
        assert client.vms() == []
    if obstacle == "file":
        assert (directory / "web.conf").read_text() == "# mine\n"
        assert [path.name for path in directory.iterdir()] == ["web.conf"]
