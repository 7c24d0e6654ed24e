"""Shared directories in a Linux guest, which mounts them by virtio-fs."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest

from tests import artifacts
from tests.guest.daemon_guest import PROMPT
from tests.guest.daemon_guest import Shell as DaemonShell
from tests.guest.linux_guest import COMMAND_LINE, Shell
from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import Daemon, vm_block
from tests.vmctl_driver import BOOT_TIMEOUT_S, ConsoleProcess, vmctl_run

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(900)]

MODULES = ("virtio_pci", "virtiofs")
COMMAND_S = 300.0
FILES = 60
LARGE = 3 << 20


def make_tree(folder: Path) -> None:
    """Make files of many sizes in some directories, with links among them."""
    chance = random.Random(1)
    for number in range(FILES):
        place = folder / f"d{number % 7}" / f"e{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        file = place / f"file {number}"
        file.write_bytes(chance.randbytes(chance.choice((0, 1, 100, 5000, 70_000))))
        file.chmod(chance.choice((0o600, 0o644, 0o755)))
    (folder / "large").write_bytes(chance.randbytes(LARGE))
    (folder / "link").symlink_to("d1/e1")
    (folder / "dangling").symlink_to("/none")


def digest(folder: Path) -> str:
    """Return a hash of names, modes, links and contents."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found.update(f"{path.relative_to(folder)} {status.st_mode:o}\n".encode())
        if path.is_symlink():
            found.update(os.fsencode(path.readlink()))
        elif path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


def test_a_tree_both_ways(tmp_path: Path) -> None:
    """A tree is copied out of one share into another, and is the same; nothing leaves either."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    make_tree(source)
    (source / "out").symlink_to(tmp_path)
    kernel = artifacts.kernel("cloud")
    arguments = vmctl_run(
        *("-m", "256M", "-b", kernel.vmlinuz),
        *("--share", f"{source}:src:ro", "--share", f"{target}:dst"),
        *("--initrd", artifacts.initramfs_with(kernel, MODULES, "virtiofs")),
        *("--append", f"{COMMAND_LINE} test=shell"),
    )
    with ConsoleProcess(arguments) as console:
        console.expect("# ")
        shell = Shell(console)
        shell.run("mkdir -p /src /dst /tmp; mount -t virtiofs -o ro src /src", COMMAND_S)
        shell.run("mount -t virtiofs dst /dst; mount -t tmpfs tmpfs /tmp", COMMAND_S)
        shell.run("cp -a /src /dst/direct", COMMAND_S)
        shell.run("cp -a /src /tmp/copy && cp -a /tmp/copy /dst/copy", COMMAND_S)
        assert "Read-only" in shell.run("touch /src/new 2>&1; true")
        assert "No such file" in shell.run("cat /src/out/source/large 2>&1; true")
        shell.run("mkdir /dst/d && echo one >/dst/d/a && mv /dst/d/a /dst/b && ln /dst/b /dst/c")
        shell.run("ln -s b /dst/s && echo two >>/dst/s && mkfifo /dst/p && rmdir /dst/d")
        assert shell.run("cat /dst/c").split() == ["one", "two"]
        shell.run("exec 3>/dst/gone; rm /dst/gone; echo x >&3; exec 3>&-; rm -r /dst/direct/d1")
        (target / "host").write_text("from the host")
        assert shell.run("sleep 2; cat /dst/host") == "from the host"
        assert int(shell.run("ls /dst | wc -l")) == 7
        shell.run("umount /dst; umount /src; mount -t virtiofs dst /dst; ls /dst", COMMAND_S)
        shell.power_off()
    assert digest(target / "copy") == digest(source)
    assert not (target / "direct" / "d1").exists()
    assert (target / "direct" / "large").read_bytes() == (source / "large").read_bytes()
    assert (target / "c").read_text() == "one\ntwo\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@needs_separation
def test_shares_of_a_vm_of_the_daemon(tmp_path: Path) -> None:
    """A tree arrives whole, a read-only share refuses writes, and both work after a reboot."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    make_tree(source)
    kernel = artifacts.kernel("cloud")
    config = vm_block(
        "linux",
        f'initrd "{artifacts.initramfs_with(kernel, MODULES, "virtiofs")}"',
        f'append "{COMMAND_LINE} test=shell"',
        f'share "{source}" tag "src"',
        f'share "{target}" tag "dst" rw',
        boot=kernel.vmlinuz,
        memory="256M",
    )
    mount = "mkdir -p /src /dst; mount -t virtiofs src /src; mount -t virtiofs dst /dst"
    warmth = {"VMD_WARM": "off"}  # which takes a minute in the rig, and is for many VMs
    with (
        Daemon(tmp_path, config, is_user=False, environ=warmth) as vmd,
        vmd.client(BOOT_TIMEOUT_S) as client,
    ):
        started = client.ask("start", name="linux")
        assert started["type"] == "started", (started, vmd.log.read_text())
        pid = started["pid"]
        with client.console("linux") as console:
            shell = DaemonShell(console)
            shell.run(mount)
            assert "Read-only" in shell.run("touch /src/new 2>&1")
            shell.run("cp -a /src /dst/copy; sync")
            console.type(b"reboot -f\n")
        client.wait_for_reboot("linux", pid)
        with client.console("linux") as console:
            console.expect(b"init: up", 2)  # the console repeats what it has said before
            console.expect(PROMPT, console.output.count(PROMPT) + 1)
            shell = DaemonShell(console)
            shell.run(mount)
            assert "60" in shell.run("find /dst/copy -name 'file *' | wc -l")
            shell.run("echo again >/dst/again")
        assert client.ask("stop", name="linux", force=True, wait=True)["type"] == "terminated"
    assert digest(target / "copy") == digest(source)
    assert (target / "again").read_text() == "again\n"
