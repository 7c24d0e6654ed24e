"""Warnings of `vmd -n` about images that a VM could not use."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import pytest

from vmd.config.check import check
from vmd.unusable import unusable
from vmm_kvm.boot.firmware import selftest_path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of several kinds, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").write_bytes(bytes(4 << 20))
    Path("disk.gz").write_bytes(gzip.compress(bytes(1 << 20)))
    Path("page.img").write_text("<html>404")
    Path("empty").touch()
    Path("text").write_text("x" * 100)
    make = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*make, "disk.qcow2", "4M"], check=True)
    subprocess.run([*make, "-u", "-b", "gone", "-F", "raw", "orphan.qcow2", "4M"], check=True)
    Path("disk.vmdk").write_bytes(b"KDMV" + bytes(1000))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ('disk "disk.raw"', ""),
        ('disk "disk.qcow2"', ""),
        ('disk "disk.gz" format raw', ""),
        ('disk "disk.gz"', "disk {}/disk.gz: compressed by gzip: unpack it first"),
        ('disk "disk.vmdk"', "disk {}/disk.vmdk: VMDK images are not supported"),
        ('disk "page.img"', "disk {}/page.img: a web page, not a disk"),
        ('disk "orphan.qcow2"', "disk {}/gone: No such file or directory"),
        ('disk "disk.raw" format qcow2', "disk {}/disk.raw: invalid magic numbers"),
        ('disk "."', "disk {}: neither a regular file nor a block device"),
        ('cdrom "disk.gz"', "cdrom {}/disk.gz: compressed by gzip: unpack it first"),
        ('cdrom "disk.qcow2"', "cdrom {}/disk.qcow2: a qcow2 image, not a disc's"),
        ('cdrom "page.img"', "cdrom {}/page.img: a web page, not a disk: download it again"),
        ('cdrom "."', "cdrom {}/.: neither a regular file nor a block device"),
        ('cdrom "gone"', "cdrom {}/gone: No such file or directory"),
        ('cdrom "disk.raw"', ""),
        ('share "." tag "t"', ""),
        ('share "gone"', "share {}/gone: No such file or directory"),
        ('share "text"', "share {}/text: not a directory"),
        ('share "vhost-user:text" tag "t"', "share {}/text: not a socket"),
        ('cloud-init "gone"', "seed: {}/gone: No such file or directory"),
        ('cloud-init "text"', "seed: {}/text: no user-data: the first line is"),
        ('ssh key "text"', "seed: {}/text: no public key"),
        ('cdrom "empty"', ""),
        ('boot "text"', "boot {}/text: not a kernel or firmware image"),
        ('boot "/bin/sh"', "a program or library of an operating system, not a kernel"),
        ('firmware "text"\nappend "x"', "boot {}/text: firmware takes no command line"),
        ('firmware "."', "boot {}: is a directory"),
        (f'boot "{selftest_path()}"\ninitrd "text"', "firmware takes no initrd: {}/text"),
    ],
)
def test_images(options: str, told: str, tmp_path: Path) -> None:
    """They are warnings: the file may be another one when the VM starts."""
    has_boot = "boot" in options or "firmware" in options
    boot = "" if has_boot else f'boot "{selftest_path()}"\n'
    Path("vm.conf").write_text(f'vm "a" {{\n{boot}{options}\n}}\n')
    lines, status = check("vm.conf", {}, inspect=unusable)
    said = [line for line in lines if "warning" in line]
    assert (status, lines[-1]) == (0, "configuration OK")
    assert len(said) == bool(told)
    if told:
        assert ': warning: vm "a": ' in said[0]
        assert told.format(tmp_path) in said[0]
