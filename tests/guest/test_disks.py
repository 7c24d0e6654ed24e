"""Disks under unmodified Debian kernels: data, features, interrupts of every kind, reboots."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import artifacts
from tests.guest.linux_guest import COMMAND_LINE, MIB, Shell
from tests.vmctl_driver import VMCTL, ConsoleProcess, vmctl_run

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(900)]

SIZE = 8 * MIB
BOOT_S = 300.0


@contextmanager
def booted(
    disks: Sequence[str], *, kernel: str = "cloud", cpus: int = 1, append: str = ""
) -> Iterator[Shell]:
    """Boot a guest to its shell, with `disks` as `-d` takes them."""
    booted_kernel = artifacts.kernel(kernel)
    arguments: tuple[str | Path, ...] = (
        *("-m", "256M", "-p", str(cpus), "-b", booted_kernel.vmlinuz),
        *("--initrd", artifacts.disk_initramfs(booted_kernel)),
        *("--append", f"{COMMAND_LINE} {append} test=shell"),
        *(word for disk in disks for word in ("-d", disk)),
    )
    with ConsoleProcess(vmctl_run(*arguments)) as console:
        console.expect("# ", BOOT_S)
        yield Shell(console)


def make_disk(path: Path, seed: int = 0, size: int = SIZE) -> Path:
    """Write a disk whose sectors all differ, and differ from other seeds'."""
    sector = b"".join(i.to_bytes(8, "little") + bytes((seed,)) * 504 for i in range(size // 512))
    path.write_bytes(sector)
    return path


def digest(path: Path) -> str:
    """Return the MD5 of a file, as the guest's md5sum prints it."""
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kernel", ["cloud", "newer-generic"])
def test_a_guest_reads_and_writes(kernel: str, tmp_path: Path) -> None:
    """A guest reads the file's contents, and the file gets its writes, on disks of all kinds.

    Each of two processors has a queue of the first disk; the second disk is read-only, the third a
    qcow2 image, and a process of its own serves the fourth.
    """
    files = [make_disk(tmp_path / f"{i}.img", seed=i, size=SIZE >> i) for i in range(4)]
    qcow2 = tmp_path / "2.qcow2"
    subprocess.run([VMCTL, "create", "-i", files[2], qcow2], check=True, capture_output=True)
    disks = [f"raw:{path}" for path in files]
    disks[0] += ",serial=first-disk,queues=2"
    disks[1] += ",ro"
    disks[2] = f"qcow2:{qcow2}"
    disks[3] += ",process"
    with booted(disks, kernel=kernel, cpus=2) as shell:
        sizes = [shell.run(f"cat /sys/block/vd{name}/size") for name in "abcd"]
        assert sizes == [str((SIZE >> i) // 512) for i in range(4)]
        assert shell.run("cat /sys/block/vda/serial") == "first-disk"
        assert shell.run("cat /sys/block/vda/queue/physical_block_size") == "4096"
        assert shell.run("cat /sys/block/vda/queue/write_cache") == "write back"
        assert shell.run("ls /sys/block/vda/mq | wc -l") == "2"
        assert len(re.findall(r"PCI-MSI.*-req\.", shell.run("cat /proc/interrupts"))) == 5
        for cpu in range(2):
            reading = f"taskset {1 << cpu} dd if=/dev/vda bs=64k iflag=direct 2>/dev/null"
            assert shell.run(f"{reading} | md5sum").split()[0] == digest(files[0])
        for name, path in zip("bcd", files[1:], strict=True):
            assert shell.run(f"md5sum </dev/vd{name}").split()[0] == digest(path)
        assert shell.run("cat /sys/block/vdb/ro") == "1"
        shell.run("! dd if=/dev/zero of=/dev/vdb bs=4k count=1 2>/dev/null")
        written = []
        for name in "acd":
            shell.run(f"dd if=/dev/urandom of=/dev/vd{name} bs=16k count=20 seek=10 2>/dev/null")
            shell.run("sync; echo 3 >/proc/sys/vm/drop_caches")
            written.append(shell.run(f"md5sum </dev/vd{name}").split()[0])
        shell.power_off()
    subprocess.run(["qemu-img", "check", "-q", qcow2], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", qcow2, files[2]], check=True)
    assert [digest(files[i]) for i in (0, 2, 3)] == written


def test_a_file_system_survives_a_reboot(tmp_path: Path) -> None:
    """Files survive a reboot of the guest in the same process, and discards work."""
    disk = make_disk(tmp_path / "disk.img", size=2 * SIZE)
    with booted([f"raw:{disk}"]) as shell:
        shell.run("mke2fs -F /dev/vda >/dev/null 2>&1 && mkdir /mnt && mount /dev/vda /mnt")
        shell.run("seq 1 200000 >/mnt/numbers && umount /mnt")
        expected = shell.run("seq 1 200000 | md5sum")
        shell.console.send("reboot -f\n")
        shell.console.expect("init: up")
        shell.console.expect("# ")
        shell.run("mkdir /mnt && mount /dev/vda /mnt")
        assert shell.run("md5sum </mnt/numbers") == expected
        shell.run("rm /mnt/numbers && fstrim /mnt && umount /mnt && blkdiscard /dev/vda")
        shell.power_off()
    assert not disk.read_bytes().strip(b"\0")


@pytest.mark.parametrize("append", ["", "pci=nomsi"], ids=["msix", "intx"])
def test_more_disks_than_interrupt_pins(append: str, tmp_path: Path) -> None:
    """A dozen disks work at once, each with messages or all on the four shared lines."""
    disks = [make_disk(tmp_path / f"{i}.img", seed=i, size=MIB) for i in range(12)]
    with booted([f"raw:{disk}" for disk in disks], append=append) as shell:
        names = [f"vd{chr(ord('a') + i)}" for i in range(12)]
        shown = shell.run(f"for d in {' '.join(names)}; do md5sum </dev/$d & done; wait")
        assert sorted(re.findall(r"\b[0-9a-f]{32}\b", shown)) == sorted(map(digest, disks))
        assert ("PCI-MSI" in shell.run("cat /proc/interrupts")) is not bool(append)
        shell.power_off()


def test_a_disk_that_is_memory(tmp_path: Path) -> None:
    """The guest reads and writes the file as memory; a private one leaves the file unchanged."""
    shared = make_disk(tmp_path / "shared.img", seed=1)
    private = make_disk(tmp_path / "private.img", seed=2)
    before = digest(private)
    plain = make_disk(tmp_path / "plain.img", seed=3)
    disks = [f"pmem:{shared}", f"pmem:{private},private", f"raw:{plain}"]
    with booted(disks) as shell:
        assert shell.run("md5sum </dev/pmem0").split()[0] == digest(shared)
        assert shell.run("md5sum </dev/pmem1").split()[0] == before
        shell.run("mke2fs -F /dev/pmem1 >/dev/null 2>&1 && mkdir /mnt && mount /dev/pmem1 /mnt")
        shell.run("seq 1 100000 >/mnt/numbers && umount /mnt")
        shell.run("dd if=/dev/vda of=/dev/pmem0 bs=1M oflag=direct 2>/dev/null && sync")
        shell.power_off()
    assert digest(shared) == digest(plain)
    assert digest(private) == before


@pytest.mark.root
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_full_host_disk(form: str, tmp_path: Path) -> None:
    """The guest gets EIO, the image stays sound, and once there is room writes succeed again."""
    host = tmp_path / "host"
    host.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", host], check=True)
    try:
        ballast, image = host / "ballast", host / "disk"
        ballast.write_bytes(bytes(6 * MIB))
        subprocess.run([VMCTL, "create", "-s", "16M", f"{form}:{image}"], check=True)
        with booted([f"{form}:{image}"]) as shell:
            writing = "dd if=/dev/zero bs=64k oflag=direct conv=notrunc"
            fill = r"tr '\0' x </dev/zero | dd iflag=fullblock bs=64k oflag=direct conv=notrunc"
            shell.run(f"{fill} of=/dev/vda count=32 2>/dev/null && sync")
            shown = shell.run(f"{fill} of=/dev/vda seek=32 count=160 2>&1 | grep -i error; true")
            assert "I/O error" in shown
            before = "dd if=/dev/vda bs=64k count=32 iflag=direct 2>/dev/null | md5sum"
            kept = shell.run(before)
            ballast.unlink()
            shell.run(f"{fill} of=/dev/vda seek=64 count=64 2>/dev/null && sync")
            assert shell.run(before) == kept
            assert shell.run("tr -d x </dev/vda | dd bs=1 count=1 2>/dev/null | wc -c") == "1"
            shell.run(f"{writing} of=/dev/vda count=8 2>/dev/null && sync")
            shell.console.send("poweroff -f\n")
            assert shell.console.wait() == 0
            assert "No space left on device" in shell.console.errors.decode()
        if form == "qcow2":
            subprocess.run(["qemu-img", "check", "-q", "-f", form, image], check=True)
        converted = tmp_path / "converted"
        convert = ("qemu-img", "convert", "-f", form, "-O", "raw")
        subprocess.run([*convert, image, converted], check=True)
        data = converted.read_bytes()
        assert data[: MIB // 2] == bytes(MIB // 2)
        assert data[MIB // 2 : 2 * MIB] == b"x" * (3 * MIB // 2)
        assert data[4 * MIB : 8 * MIB] == b"x" * (4 * MIB)
    finally:
        subprocess.run(["umount", host], check=True)
