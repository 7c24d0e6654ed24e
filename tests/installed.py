"""Checks of disks by installed systems: boots through firmware and GRUB, and fio's verified load.

`tests/guest/test_installed.py` runs a part of them, `tests/campaigns/installed.py` all. All images
are copied into a directory that should be in memory.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.debian import Debian, root_offset
from tests.guest.linux_guest import Shell
from tests.vmctl_driver import VMCTL, ConsoleProcess, vmctl_run

_MIB = 1 << 20
# Completed reads, writes, discards and flushes. Source: Linux Documentation/block/stat.rst.
_STAT_FIELDS = (0, 4, 11, 15)
FIRMWARE_S = 300.0
_MARKS, _MARK_LINES = "/var/boots", 20_000  # what each boot adds to a file of the guest
LOGIN_S = 300.0
FIO_S = 600.0
VMM_BLK = VMCTL.with_name("vmm-blk")


def create(*arguments: str | Path) -> None:
    """Run `vmctl create`, without its progress bar."""
    run(VMCTL, "create", *arguments)


def run(*command: str | Path) -> str:
    """Run a program that has to succeed; return its output."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def boot_to_login(disk: str, *options: str | Path, firmware: str = "pc") -> None:
    """Boot an installed system from `disk`, as `-d` takes it; log in, write, and power off.

    `firmware` is the platform that GRUB reports: pc or efi.
    """
    with ConsoleProcess(vmctl_run("-m", "384M", "-d", disk, *options)) as console:
        console.expect(f"grub: {firmware}", FIRMWARE_S)
        console.expect(r"debian login: ", LOGIN_S)
        console.send("root\n")
        console.expect("# ")
        shell = Shell(console)
        assert shell.run("findmnt -n -o OPTIONS /").startswith("rw,")
        assert shell.run("systemctl --failed --plain --no-legend") == ""
        shell.run(f"seq 1 {_MARK_LINES} >> {_MARKS} && sync")
        console.send("systemctl poweroff\n")
        assert console.wait() == 0, console.errors
        assert console.errors == b""


def firmware_options(firmware: str, nvram: Path) -> tuple[str | Path, ...]:
    """Return the options of `vmctl run` for a firmware in the words of `boot_to_login`."""
    return ("--firmware", "uefi", "--nvram", nvram) if firmware == "efi" else ()


def boots(raw: Path) -> int:
    """Return the number of boots that left their mark on a raw image of the system."""
    shown = run("debugfs", "-R", f"cat {_MARKS}", f"{raw}?offset={root_offset()}")
    return shown.count("\n") // _MARK_LINES


def check_file_system(raw: Path) -> None:
    """Check the root file system of a raw image by e2fsck; it must find nothing."""
    run("e2fsck", "-fn", f"{raw}?offset={root_offset()}")


def check_qcow2(image: Path, raw: Path) -> None:
    """Check an image by `qemu-img`, and its file system by e2fsck, in a copy at `raw`."""
    run("qemu-img", "check", "-q", "-f", "qcow2", image)
    raw.unlink(missing_ok=True)
    create("-i", image, f"raw:{raw}")
    check_file_system(raw)


@contextmanager
def ours(debian: Debian, disks: Sequence[str]) -> Iterator[Shell]:
    """Boot the system's kernel to a shell of root's, with `disks` from /dev/vdb on."""
    arguments = vmctl_run(
        *("-m", "384M", "-b", debian.vmlinuz, "--initrd", debian.initrd),
        *("--append", _COMMAND_LINE, "-d", f"raw:{debian.disk},ro"),
        *(word for disk in disks for word in ("-d", disk)),
    )
    with _shell(arguments) as shell:
        yield shell


@contextmanager
def qemus(debian: Debian, options: Sequence[str]) -> Iterator[Shell]:
    """Boot the same under QEMU on the same KVM; `options` are QEMU's, for disks from /dev/vdb."""
    arguments = [
        *("qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-nodefaults"),
        *("-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"),
        *("-object", "memory-backend-memfd,id=ram,size=384M,share=on", "-m", "384M"),
        *("-machine", "q35,memory-backend=ram"),
        *("-kernel", str(debian.vmlinuz), "-initrd", str(debian.initrd)),
        *("-append", _COMMAND_LINE),
        *drive(debian.disk, "raw", "read-only=on"),
        *options,
    ]
    with _shell(arguments) as shell:
        yield shell


_COMMAND_LINE = "root=/dev/vda3 ro console=ttyS0 quiet panic=-1 init=/bin/bash"


@contextmanager
def _shell(arguments: Sequence[str]) -> Iterator[Shell]:
    with ConsoleProcess(arguments) as console:
        console.expect("# ", LOGIN_S)
        yield Shell(console)
        # There is no init that could power off.
        console.send("sync; echo o > /proc/sysrq-trigger; sleep 60\n")
        assert console.wait() == 0, console.errors


@contextmanager
def served(*command: str | Path, socket: Path) -> Iterator[Path]:
    """Run a vhost-user server while the context lasts; it must end by itself or by SIGTERM."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            deadline = time.monotonic() + 60
            while not socket.exists():
                assert server.poll() is None, server.communicate()
                assert time.monotonic() < deadline, f"{command[0]}: no {socket}"
                time.sleep(0.1)
            yield socket
        finally:
            server.terminate()
            _, errors = server.communicate(timeout=60)
    assert errors == "", errors


def load(device: str, megabytes: int) -> list[str]:
    """Return shell commands that put fio's loads on a disk of four times `megabytes`.

    The first quarter gets bytes that depend on nothing but the seed. On the second and third two
    jobs write at random and flush, 8 requests deep each, while a third trims the last; each reads
    back its own writes, with a checksum of each block. Then the last quarter is written the same
    way. At the end all but the first quarter is zeroed, so that the final contents are always the
    same.
    """
    size = f"--size={megabytes}m"
    common = (
        f"fio --filename=/dev/{device} --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=8"
        " --randseed=7 --verify_state_save=0 --minimal --output=/dev/null"
    )
    verified = f"--rw=randwrite {size} --fsync=32 --verify=crc32c --verify_fatal=1"
    last = f"--offset={3 * megabytes}m"
    together = (
        f"--name=verified {verified} --offset={megabytes}m --numjobs=2"
        f" --offset_increment={megabytes}m"
    )
    return [
        f"{common} --name=same --rw=randwrite {size} --refill_buffers",
        f"{common} --name=filled --rw=write {size} {last}",
        f"{common} --name=trimmed --rw=randtrim {size} {last} {together}",
        f"{common} --name=again {verified} {last}",
        f"blkdiscard -z -o {megabytes}M -l {3 * megabytes}M /dev/{device} && sync",
    ]


class Fio:
    """Disks of every kind under the same load, ours and QEMU's, which must end up equal."""

    def __init__(self, debian: Debian, folder: Path, megabytes: int) -> None:
        """Make blank images and a base in `folder`; `megabytes` is a quarter of a disk."""
        self.debian = debian
        self.folder = folder
        self.megabytes = megabytes
        self.size = f"{4 * megabytes}M"
        plain = folder / "plain.raw"
        # Half noise and half zeros, so that a load reads and overwrites both in the base.
        noise = debian.disk.open("rb")
        with noise, plain.open("wb") as file:
            noise.seek(root_offset() + 64 * _MIB)
            for _ in range(megabytes):
                file.write(noise.read(2 * _MIB))
                file.seek(2 * _MIB, 1)
            file.truncate(4 * megabytes * _MIB)
        create("-i", plain, f"qcow2:{folder / 'base.qcow2'}")
        for kind in ("zlib", "zstd"):
            run(
                *("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}"),
                *(plain, folder / f"{kind}.qcow2"),
            )

    def raw(self, name: str) -> Path:
        """Make a blank raw image."""
        path = self.folder / f"{name}.raw"
        create("-s", self.size, path)
        return path

    def qcow2(self, name: str) -> Path:
        """Make a blank qcow2 image."""
        path = self.folder / f"{name}.qcow2"
        create("-s", self.size, path)
        return path

    def overlay(self, name: str, base: str) -> Path:
        """Make an overlay on `base`: base, zlib or zstd."""
        path = self.folder / f"{name}.qcow2"
        create("-b", self.folder / f"{base}.qcow2", path)
        return path

    def under_ours(self, disks: Mapping[str, str]) -> None:
        """Put the load on disks by `vmctl run`, and print the seconds of each."""
        with ours(self.debian, list(disks.values())) as shell:
            self._load(shell, disks)

    def under_qemu(self, disks: Mapping[str, Sequence[str]]) -> None:
        """Put the load on disks by QEMU, with the given options for each."""
        options = [word for words in disks.values() for word in words]
        with qemus(self.debian, options) as shell:
            self._load(shell, disks)

    def _load(self, shell: Shell, disks: Mapping[str, object]) -> None:
        for number, name in enumerate(disks):
            begun = time.monotonic()
            device = f"vd{chr(ord('b') + number)}"
            for command in load(device, self.megabytes):
                shell.run(command, FIO_S)
            counts = [int(count) for count in shell.run(f"cat /sys/block/{device}/stat").split()]
            assert all(counts[field] for field in _STAT_FIELDS), f"{name}: {counts}"
            print(f"fio on {name}: verified, {time.monotonic() - begun:.0f} s", flush=True)


def compare(one: Path, other: Path) -> None:
    """Compare two images by `qemu-img`; it must find no difference."""
    assert "identical" in run("qemu-img", "compare", one, other)


def drive(image: Path, form: str, options: str = "discard=unmap") -> list[str]:
    """Return QEMU's options for an image on a virtio disk; disks get letters in their order."""
    name = image.stem
    return [
        *("-drive", f"if=none,id={name},format={form},{options},file={image}"),
        *("-device", f"virtio-blk-pci,drive={name}"),
    ]


def whole_fio(debian: Debian, folder: Path, megabytes: int) -> None:
    """Load disks of every kind under ours and QEMU, with servers of both, and compare them all."""
    fio = Fio(debian, folder, megabytes)
    raw, process = fio.raw("ours"), fio.qcow2("process")
    qcow2, by_daemon = fio.qcow2("ours"), fio.raw("by-daemon")
    overlays = {base: fio.overlay(f"on-{base}", base) for base in ("base", "zlib", "zstd")}
    theirs, their_overlay = fio.raw("theirs"), fio.overlay("their-overlay", "base")
    ours_by_qemu = fio.qcow2("ours-by-qemu")
    with ExitStack() as stack:
        socket = folder / "daemon.sock"
        stack.enter_context(
            served(
                "qemu-storage-daemon",
                *("--blockdev", f"file,node-name=file,filename={by_daemon},discard=unmap"),
                *("--blockdev", "raw,node-name=disk,file=file,discard=unmap"),
                "--export",
                "vhost-user-blk,id=export,node-name=disk,writable=on,"
                f"addr.type=unix,addr.path={socket}",
                socket=socket,
            )
        )
        fio.under_ours(
            {
                "raw": f"raw:{raw}",
                "qcow2": f"qcow2:{qcow2}",
                **{f"overlay on {name}": f"qcow2:{path}" for name, path in overlays.items()},
                "qcow2, device process": f"qcow2:{process},process",
                "qemu-storage-daemon": f"vhost-user:{socket}",
            }
        )
    socket = folder / "blk.sock"
    command = (VMM_BLK, "--format", "qcow2", "--socket", socket, ours_by_qemu)
    with served(*command, socket=socket):
        fio.under_qemu(
            {
                "QEMU, raw": drive(theirs, "raw"),
                "QEMU, overlay": drive(their_overlay, "qcow2"),
                "QEMU, vmm-blk": [
                    *("-chardev", f"socket,id=blk,path={socket}"),
                    *("-device", "vhost-user-blk-pci,chardev=blk"),
                ],
            }
        )
    for image in (raw, qcow2, process, by_daemon, ours_by_qemu):
        compare(image, theirs)
    for image in overlays.values():
        compare(image, their_overlay)
    for image in (qcow2, process, ours_by_qemu, *overlays.values()):
        run("qemu-img", "check", "-q", "-f", "qcow2", image)
