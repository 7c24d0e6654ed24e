"""Disks on real KVM, by guests that any /dev/kvm runs: SeaBIOS boots sectors made here."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests import artifacts
from tests.vmctl_driver import ConsoleProcess, vmctl_run

pytestmark = pytest.mark.kvm

GOOD = 42
OPTIONS = "(ro, serial=, queues=, process, snapshot, error= or private)"
STATUS = GOOD << 1 | 1
DISK_SIZE = 1 << 20
PACKET = 0x40  # offset in the boot sector: the parameters of INT 13h
LOADED = 0x8000


def boot_sector(function: int, sector: int, drive: int | None = None) -> bytes:
    """Return a boot sector that asks the BIOS for one sector of its own disk, or of another.

    It ends the run through isa-debug-exit: with the first byte of a sector that was read, with 42
    after a write, with 1 if the BIOS reports an error.

    Args:
        function: of INT 13h: 0x42 reads to LOADED, 0x43 writes the boot sector itself.
        sector: its number.
        drive: the BIOS's number of another disk.
    """
    address = LOADED if function == 0x42 else 0x7C00
    code = b"".join(
        (
            bytes.fromhex("fa"),  # cli
            bytes.fromhex("31c0"),  # xor %ax, %ax
            bytes.fromhex("8ed8"),  # mov %ax, %ds
            bytes.fromhex("8ed0"),  # mov %ax, %ss
            bytes.fromhex("bc007c"),  # mov $0x7c00, %sp
            bytes.fromhex("fb"),  # sti
            b"\xc6\x06" + LOADED.to_bytes(2, "little") + bytes((GOOD,)),  # movb $42, LOADED
            b"\xbe" + (0x7C00 + PACKET).to_bytes(2, "little"),  # mov $packet, %si
            b"\xb8" + bytes((0, function)),  # mov $(function << 8), %ax
            b"" if drive is None else bytes((0xB2, drive)),  # mov $drive, %dl
            bytes.fromhex("cd13"),  # int $0x13; %dl is the disk that we come from
            bytes.fromhex("b001"),  # mov $1, %al
            bytes.fromhex("7203"),  # jc report
            b"\xa0" + LOADED.to_bytes(2, "little"),  # mov LOADED, %al
            bytes.fromhex("e6f4"),  # report: out %al, $0xf4
            bytes.fromhex("f4ebfd"),  # hlt; jmp . - 1
        )
    )
    packet = (
        b"\x10\x00\x01\x00"
        + address.to_bytes(2, "little")
        + bytes(2)
        + sector.to_bytes(8, "little")
    )
    return (code.ljust(PACKET, b"\0") + packet).ljust(510, b"\0") + b"\x55\xaa"


def disk(path: Path, *sectors: bytes) -> Path:
    """Write a disk that begins with `sectors`."""
    path.write_bytes(b"".join(sectors).ljust(DISK_SIZE, b"\0"))
    return path


def run(*arguments: str, timeout_s: int = 60) -> tuple[int, bytes]:
    """Run SeaBIOS with disks; returns the exit status and the errors."""
    limit = ("--timeout", str(timeout_s))
    done = subprocess.run(
        vmctl_run("-m", "64M", "-b", artifacts.seabios(), *limit, *arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("options", ["", ",process"])
def test_firmware_boots_from_a_disk(tmp_path: Path, options: str) -> None:
    """SeaBIOS finds the disk, boots its first sector, and reads the next for it."""
    image = disk(tmp_path / "disk.img", boot_sector(0x42, 1), bytes((GOOD,)) * 512)
    assert run("-d", f"raw:{image}{options}") == (STATUS, b"")


@pytest.mark.parametrize("options", ["", ",process"])
def test_firmware_writes_to_a_disk(tmp_path: Path, options: str) -> None:
    """The BIOS's writes are in the file when the command ends."""
    sector = boot_sector(0x43, 2)
    image = disk(tmp_path / "disk.img", sector)
    assert run("-d", f"raw:{image}{options}") == (STATUS, b"")
    assert image.read_bytes()[1024:1536] == sector


def test_firmware_cannot_write_to_a_read_only_disk(tmp_path: Path) -> None:
    """The BIOS reports an error, and the file is as it was."""
    image = disk(tmp_path / "disk.img", boot_sector(0x43, 2))
    before = image.read_bytes()
    assert run("-d", f"raw:{image},ro") == (1 << 1 | 1, b"")
    assert image.read_bytes() == before


@pytest.mark.parametrize("number", [1, 12])
def test_firmware_boots_from_the_first_disk(tmp_path: Path, number: int) -> None:
    """With -B disk the first of several disks is booted, whatever its slot is."""
    first = disk(tmp_path / "first.img", boot_sector(0x42, 1), bytes((GOOD,)) * 512)
    others = [disk(tmp_path / f"{i}.img", boot_sector(0x42, 1)) for i in range(number)]
    arguments = [word for path in (first, *others) for word in ("-d", f"raw:{path}")]
    assert run("-B", "disk", *arguments) == (STATUS, b"")


def test_no_device_to_boot_from(tmp_path: Path) -> None:
    """With -B net firmware does not fall back to the disk."""
    image = disk(tmp_path / "disk.img", boot_sector(0x42, 1), bytes((GOOD,)) * 512)
    status, errors = run("-B", "net", "-d", f"raw:{image}", timeout_s=5)
    assert (status, errors) == (124, b"vmctl: timed out after 5 s\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-d", "nowhere.img"), "nowhere.img: No such file or directory"),
        (("-d", "nowhere.img,process"), "nowhere.img: No such file or directory"),
        (("-d", "vhost-user:nowhere"), "vhost-user:nowhere: No such file or directory"),
        (("-d", "raw:"), "invalid disk: raw:: no path"),
        (
            ("-d", "x,size=1"),
            f"invalid disk: x,size=1: unknown option 'size=1' {OPTIONS}",
        ),
        (("-B", "floppy"), "unknown boot device floppy (disk, cdrom or net)"),
        (("-B", "auto"), "unknown boot device auto (disk, cdrom or net)"),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], message: str) -> None:
    """A wrong disk is reported in one line."""
    assert run(*arguments) == (1, f"vmctl: {message}\n".encode())


def test_an_image_that_is_in_use(tmp_path: Path) -> None:
    """Writing one disk as two is refused, because writers would destroy it; reading it is not."""
    image = disk(tmp_path / "disk.img", boot_sector(0x42, 1), bytes((GOOD,)) * 512)
    (tmp_path / "link.img").symlink_to(image)
    for options in ("", ",ro", ",process"):
        status, errors = run("-d", f"raw:{tmp_path}/link.img{options}", "-d", f"raw:{image}")
        assert (status, errors) == (1, f"vmctl: {image}: the same disk twice\n".encode())
    assert run("-d", f"raw:{image},ro", "-d", f"raw:{image},ro") == (STATUS, b"")


def test_who_uses_an_image_is_told(tmp_path: Path) -> None:
    """The error names the process that has the image open."""
    image = disk(tmp_path / "disk.img")
    command = vmctl_run("-m", "64M", "-b", artifacts.seabios(), "-d", f"raw:{image}")
    with ConsoleProcess(command) as vm:
        vm.expect("SeaBIOS")
        status, errors = run("-d", f"raw:{image}")
        assert status == 1
        assert f": pid {vm.pid} (vmctl)\n".encode() in errors
        vm.signal(signal.SIGKILL)
        assert vm.wait() == -signal.SIGKILL


def test_more_devices_than_slots(tmp_path: Path) -> None:
    """A bus has 31 slots besides the host bridge's; more disks are refused."""
    images = [disk(tmp_path / f"{i}.img") for i in range(32)]
    arguments = [word for path in images for word in ("-d", f"raw:{path}")]
    assert run(*arguments) == (1, b"vmctl: more than 31 PCI devices\n")


@pytest.mark.parametrize("options", ["snapshot", "snapshot,process"])
@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_a_snapshot_is_thrown_away(disk_format: str, options: str, tmp_path: Path) -> None:
    """The guest writes its disk, but the image does not change, and SIGKILL leaves no file."""
    image, scratch = tmp_path / "disk", tmp_path / "scratch"
    scratch.mkdir()
    source = tmp_path / "source.img"
    source.write_bytes(boot_sector(0x43, 8).ljust(DISK_SIZE, b"\0"))
    command = ["qemu-img", "convert", "-f", "raw", "-O", disk_format, str(source), str(image)]
    subprocess.run(command, check=True)
    before = image.read_bytes()
    run = vmctl_run("-m", "64M", "-d", f"{disk_format}:{image},{options}", "--timeout", "60")
    with ConsoleProcess(run, environment={"TMPDIR": str(scratch)}) as guest:
        assert guest.wait(80) == STATUS
    with ConsoleProcess(run, environment={"TMPDIR": str(scratch)}) as guest:
        guest.expect("SeaBIOS", 60)
        guest.signal(signal.SIGKILL)
        guest.wait(10)
    assert list(scratch.iterdir()) == []
    assert image.read_bytes() == before
