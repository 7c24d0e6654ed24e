"""The guest of `vmctl run -- command`: its kernel, its modules, its initramfs."""

from __future__ import annotations

import gzip
import lzma
import subprocess
from pathlib import Path

import pytest

from vmctl.foreground.root_guest import Kernel, find_kernel, initramfs, load_order
from vmctl.foreground.run_command import agent_path
from vmctl.line.cli import UsageError, read
from vmm_kvm.errors import SpecError

TABLE = """kernel/a/virtiofs.ko.xz: kernel/a/fuse.ko.xz
kernel/a/fuse.ko.xz:
kernel/b/virtio_pci.ko: kernel/b/modern-dev.ko kernel/b/virtio.ko kernel/b/virtio_ring.ko
kernel/b/modern-dev.ko:
kernel/b/virtio.ko: kernel/b/virtio_ring.ko
kernel/b/virtio_ring.ko:
"""


def test_the_order_of_modules() -> None:
    """Each module follows those that it needs, once; one that the table lacks is built in."""
    order = load_order(TABLE, ("virtio_pci", "virtiofs", "overlay", "modern_dev"))
    assert order == [
        *("kernel/b/virtio_ring.ko", "kernel/b/virtio.ko", "kernel/b/modern-dev.ko"),
        *("kernel/b/virtio_pci.ko", "kernel/a/fuse.ko.xz", "kernel/a/virtiofs.ko.xz"),
    ]


def bzimage(version: bytes) -> bytes:
    """Return as much of a bzImage as says its version."""
    image = bytearray(0x400)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x100).to_bytes(2, "little")
    image[0x300 : 0x300 + len(version)] = version
    return bytes(image)


def test_modules_beside_a_kernel(tmp_path: Path) -> None:
    """A kernel says its version; its modules are near it, as packages have them."""
    image = tmp_path / "boot" / "vmlinuz"
    image.parent.mkdir()
    image.write_bytes(bzimage(b"6.1.0-test (me@here) #1"))
    assert find_kernel(str(image)) == Kernel(image, ())
    folder = tmp_path / "lib/modules/6.1.0-test"
    folder.mkdir(parents=True)
    (folder / "modules.dep").write_text(TABLE)
    found = find_kernel(str(image))
    assert [path.name for path in found.modules][-2:] == ["fuse.ko.xz", "virtiofs.ko.xz"]
    assert found.modules[0] == folder / "kernel/b/virtio_ring.ko"
    with pytest.raises(SpecError, match=r"virtio_ring\.ko: .*No such file"):
        initramfs(found, Path("/agent"), is_writable=False)
    image.write_bytes(bzimage(b"../../../etc (x)"))
    assert find_kernel(str(image)).modules == ()
    image.write_bytes(b"\x7fELF")
    assert find_kernel(str(image)).modules == ()
    with pytest.raises(SpecError, match="No such file"):
        find_kernel(str(tmp_path / "none"))


def test_an_initramfs(tmp_path: Path) -> None:
    """It has the program, the console and the modules, unpacked, in the order of loading."""
    modules = tmp_path / "a.ko.xz", tmp_path / "b.ko.gz", tmp_path / "c.ko"
    modules[0].write_bytes(lzma.compress(b"first"))
    modules[1].write_bytes(gzip.compress(b"second"))
    modules[2].write_bytes(b"third")
    archive = initramfs(Kernel(tmp_path, modules), Path("/some/agent.py"), is_writable=False)
    members = contents(archive)
    assert [name for name in members if name.startswith("modules/")] == [
        *("modules/00.ko", "modules/01.ko", "modules/02.ko"),
    ]
    assert members["modules/01.ko"] == b"second"
    assert members["init"].startswith(b"\x7fELF")
    for text in (b"/some/agent.py", b"overlay", b"virtiofs", b"/modules/02.ko"):
        assert text in members["init"]
    writable = contents(initramfs(Kernel(tmp_path, ()), Path("/agent"), is_writable=True))
    assert b"overlay" not in writable["init"]
    listed = subprocess.run(
        ["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True
    )
    assert listed.stdout.decode().split() == list(members)


def contents(archive: bytes) -> dict[str, bytes]:
    """Return the members of a newc archive."""
    at, members = 0, dict[str, bytes]()
    while True:
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, length = fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length - 1].decode()
        if name == "TRAILER!!!":
            return members
        start = at + 110 + length + -(110 + length) % 4
        members[name] = archive[start : start + size]
        at = start + size + -size % 4


def test_the_agent_is_there() -> None:
    """The path that the guest executes is the agent's."""
    assert agent_path().read_text().startswith("#!/usr/bin/env python3\n")


def test_the_command_line() -> None:
    """Words after -- are the command, options and all; without it, a word is the VM's name."""
    invocation = read(["run", "-b", "kernel", "web", "--rw", "--", "ls", "-l", "--", "x"])
    assert invocation.words == ["web"]
    assert invocation.values["command"] == ("ls", "-l", "--", "x")
    assert invocation.values["is_writable"] is True
    assert read(["run", "--selftest", "--"]).values == {"selftest": True}
    with pytest.raises(UsageError, match="--rw is not for start"):
        read(["start", "--rw", "web"])
