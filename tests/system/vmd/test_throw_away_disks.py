"""Throw-away disks of the daemon: the guest's writes are gone with the VM, not with a reboot."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.vmd.daemon import ROOT, Client, Daemon

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]
# Prints a letter of the second sector between signs, and writes the next one there; reboots at
# any typed input.
_COUNTING = b"".join(
    (
        bytes.fromhex("31c0"),  # xor %ax, %ax
        bytes.fromhex("8ed8"),  # mov %ax, %ds
        bytes.fromhex("8ec0"),  # mov %ax, %es
        bytes.fromhex("52"),  # push %dx, which is the drive
        bytes.fromhex("b80102"),  # mov $0x0201, %ax: read one sector
        bytes.fromhex("b90200"),  # mov $2, %cx: the second
        bytes.fromhex("b600"),  # mov $0, %dh
        bytes.fromhex("bb007e"),  # mov $0x7e00, %bx
        bytes.fromhex("cd13"),  # int $0x13
        bytes.fromhex("8a0e007e"),  # mov 0x7e00, %cl
        bytes.fromhex("fe06007e"),  # incb 0x7e00
        bytes.fromhex("5a"),  # pop %dx
        bytes.fromhex("51"),  # push %cx
        bytes.fromhex("b80103"),  # mov $0x0301, %ax: write one sector
        bytes.fromhex("b90200"),  # mov $2, %cx
        bytes.fromhex("b600"),  # mov $0, %dh
        bytes.fromhex("cd13"),  # int $0x13
        bytes.fromhex("59"),  # pop %cx
        bytes.fromhex("fa"),  # cli
        bytes.fromhex("baf803"),  # mov $0x3f8, %dx
        bytes.fromhex("b03d"),  # mov $'=', %al
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("88c8"),  # mov %cl, %al
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("b03d"),  # mov $'=', %al
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("bafd03"),  # mov $0x3fd, %dx
        bytes.fromhex("ec"),  # wait: in %dx, %al
        bytes.fromhex("a801"),  # test $1, %al
        bytes.fromhex("74fb"),  # jz wait
        bytes.fromhex("baf90c"),  # mov $0xcf9, %dx
        bytes.fromhex("b006"),  # mov $6, %al: reset
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("ebfe"),  # jmp .
    )
)


def _disk(folder: Path, disk_format: str) -> Path:
    source, image = folder / "source.img", folder / f"disk.{disk_format}"
    code = _COUNTING.ljust(510, b"\0") + b"\x55\xaa"
    source.write_bytes((code + b"a").ljust(1 << 20, b"\0"))
    command = ["qemu-img", "convert", "-f", "raw", "-O", disk_format, str(source), str(image)]
    subprocess.run(command, check=True)
    return image


def vmctl(vmd: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command, which must succeed."""
    return subprocess.run(
        [sys.executable, "-m", "vmctl", *words],
        cwd=ROOT,
        env={**os.environ, "VMD_SOCKET": str(vmd.socket)},
        check=True,
        capture_output=True,
        text=True,
    )


def _boots(client: Client, name: str) -> None:
    """Have a VM boot, reboot, and end: the second boot finds the first one's writes."""
    with client.console(name) as console:
        console.expect(b"=a=")
        pid = client.vm(name)["pid"]
        console.type(b"r")
        client.wait_for_reboot(name, pid)
    with client.console(name) as console:
        console.expect(b"=b=")
    assert client.ask("stop", name=name, force=True, wait=True)["type"] == "terminated"


def test_of_the_configuration(start_vmd: Start, tmp_path: Path) -> None:
    """The disk keeps its writes over a reboot only; two VMs share the image, which is unchanged."""
    image = _disk(tmp_path, "qcow2")
    before = image.read_bytes()
    disk = f'disk "{image}" format qcow2 {{ snapshot }}'
    config = "".join(f'vm "{name}" {{\n\tmemory 64M\n\tdisable\n\t{disk}\n}}\n' for name in "xy")
    with start_vmd(config) as vmd, vmd.client() as client:
        for name in "xy":
            assert client.ask("start", name=name)["type"] == "started"
        shown = vmctl(vmd, "show", "x").stdout
        assert f"disk 0: {image} qcow2 snapshot\n" in shown
        _boots(client, "x")
        assert client.ask("start", name="x")["type"] == "started"
        with client.console("x") as console:
            console.expect(b"=a=")
        sink, source = os.pipe()
        os.set_blocking(source, False)
        refused = client.ask("send", (source,), name="x", stream=0)
        os.close(sink)
        os.close(source)
        assert refused["type"] == "failed", refused
        assert refused["message"] == f"{image}: a throw-away disk stays with its VM"
        assert client.vm("x")["state"] == "running"
    assert image.read_bytes() == before


def test_of_a_client(tmp_path: Path, start_vmd: Start) -> None:
    """`vmctl start` has the same option as `vmctl run`; the image is only read."""
    image = _disk(tmp_path, "raw")
    before = image.read_bytes()
    with start_vmd("") as vmd, vmd.client() as client:
        words = ["-m", "64M", "-d", f"raw:{image},snapshot", "-i", "1", "new"]
        vmctl(vmd, "start", *words)
        with client.console("new") as console:
            console.expect(b"=a=")
    assert image.read_bytes() == before
