"""CD-ROMs, firmware, and the smaller devices, with boot loaders and drivers of distributions."""

from __future__ import annotations

import hashlib
import random
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import artifacts, media
from tests.guest.linux_guest import COMMAND_LINE, Shell
from tests.vmctl_driver import ConsoleProcess, vmctl_run
from vmm_kvm.arch.x86.smbios import name_uuid

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(400)]

FIRMWARE_S = 200.0


@contextmanager
def linux(*options: str | Path, append: str = "") -> Iterator[Shell]:
    """Boot a kernel with drivers for all our devices to its shell."""
    kernel = artifacts.kernel("cloud")
    arguments = vmctl_run(
        *("-m", "256M", "-b", kernel.vmlinuz, "--initrd", artifacts.media_initramfs(kernel)),
        *("--append", f"{COMMAND_LINE} {append} test=shell"),
        *options,
    )
    with ConsoleProcess(arguments) as console:
        console.expect("# ")
        yield Shell(console)


def test_linux_reads_a_disc(tmp_path: Path) -> None:
    """The drive is sr0; its device and a file on it read as on the host, to the end."""
    content = random.Random(1).randbytes(3_000_001)
    disc = media.data_iso(tmp_path / "data.iso", {"folder/content": content})
    with linux("-r", disc) as shell:
        assert shell.run("cat /sys/block/sr0/device/vendor") == "OpenBSD"
        assert shell.run("cat /sys/block/sr0/device/model") == "VMM CD-ROM"
        size = int(shell.run("cat /sys/block/sr0/size")) * 512
        assert size == disc.stat().st_size
        whole = hashlib.md5(disc.read_bytes()).hexdigest()
        assert shell.run("md5sum </dev/sr0").split()[0] == whole
        shell.run("mkdir /mnt && mount -t iso9660 -o ro /dev/sr0 /mnt")
        inside = hashlib.md5(content).hexdigest()
        assert shell.run("md5sum </mnt/folder/content").split()[0] == inside
        shell.run("umount /mnt")
        shell.run("! dd if=/dev/zero of=/dev/sr0 count=1 2>/dev/null")
        assert shell.run("dmesg | grep -i -E 'sr0.*(error|fail|sense)' | wc -l") == "0"
        shell.power_off()


def test_linux_knows_entropy_and_identity() -> None:
    """The source of entropy is ours and does not run dry; SMBIOS names the machine."""
    with linux("guest") as shell:
        assert shell.run("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0"
        taken = "dd if=/dev/hwrng bs=4k count=64 iflag=fullblock 2>/dev/null"
        first, second = (shell.run(f"{taken} | md5sum") for _ in range(2))
        assert first != second
        assert shell.run(f"{taken} | wc -c") == str(64 * 4096)
        for name, expected in {
            "sys_vendor": "OpenBSD",
            "product_name": "VMM",
            "bios_vendor": "OpenBSD",
            "product_uuid": str(uuid.UUID(bytes=name_uuid("guest"))),
        }.items():
            assert shell.run(f"cat /sys/class/dmi/id/{name}") == expected
        shell.power_off()


def test_linux_talks_on_hvc0() -> None:
    """The shell on the virtio console loses no byte in either direction.

    (Few bytes: Linux writes 16 at a time there, and spins until the device has taken them, which
    is slow if all threads share one emulated processor.)
    """
    with linux("--virtio-console", append="console=hvc0") as shell:
        assert shell.run("cat /sys/class/tty/console/active").split()[-1] == "hvc0"
        lines = shell.run("seq 1 200").split()
        assert lines == [str(number) for number in range(1, 201)]
        shell.power_off()


def shown(text: str) -> str:
    """Return a pattern of `text` as SeaBIOS shows it, with cursor movements anywhere in it."""
    return r"(?:\r|\x1b\[[0-9;]*[A-Za-z])*".join(map(re.escape, text))


@contextmanager
def booted(option: str, image: Path, memory: str = "128M") -> Iterator[ConsoleProcess]:
    """Boot an image as a CD-ROM (-r) or as a disk (-d)."""
    medium = image if option == "-r" else f"raw:{image},ro"
    with ConsoleProcess(vmctl_run("-m", memory, option, medium)) as guest:
        yield guest


as_disc_and_disk = pytest.mark.parametrize("option", ["-r", "-d"])


@as_disc_and_disk
def test_grub_starts(option: str, tmp_path: Path) -> None:
    """A GRUB rescue image boots as a CD-ROM and as a disk, and reads its own configuration."""
    image = media.grub_iso(tmp_path / "grub.iso", "echo grub-is-up\nls")
    with booted(option, image) as guest:
        guest.expect(shown("grub-is-up"), FIRMWARE_S)
        guest.expect(shown("(cd" if option == "-r" else "(hd0"), FIRMWARE_S)
        guest.expect(shown("grub>"), FIRMWARE_S)


@as_disc_and_disk
def test_isolinux_starts(option: str, tmp_path: Path) -> None:
    """ISOLINUX finds its configuration on the medium and prompts."""
    image = media.isolinux_iso(tmp_path / "isolinux.iso", "prompt 1\ntimeout 600\nsay it-is-up")
    with booted(option, image) as guest:
        guest.expect(shown("it-is-up"), FIRMWARE_S)
        guest.expect(shown("boot:"), FIRMWARE_S)


@as_disc_and_disk
def test_memtest_starts_from_a_medium(option: str, tmp_path: Path) -> None:
    """memtest86+, loaded by ISOLINUX, shows the progress of its first test."""
    image = media.isolinux_iso(
        tmp_path / "memtest.iso",
        "default memtest\nlabel memtest\nkernel /memtest\nappend console=ttyS0,115200",
        {"memtest": artifacts.memtest().read_bytes()},
    )
    with booted(option, image, "64M") as guest:
        guest.expect(shown("Memtest86"), FIRMWARE_S)
        guest.expect(r"Test|Pass", FIRMWARE_S)
        guest.expect("#", FIRMWARE_S)


@as_disc_and_disk
def test_ipxe_starts(option: str) -> None:
    """The image of iPXE names itself, and reports that there is no network to boot from."""
    with booted(option, media.ipxe_iso()) as guest:
        guest.expect(shown("iPXE"), FIRMWARE_S)
        guest.expect(shown("No more network devices"), FIRMWARE_S)


def test_uefi_boots_a_disc_and_keeps_variables(tmp_path: Path) -> None:
    """UEFI firmware boots GRUB from a CD-ROM; its variables are kept until the next start."""
    image = media.grub_iso(tmp_path / "grub.iso", "echo grub-is-up", firmware="uefi")
    nvram = tmp_path / "guest.nvram"
    template = Path("/usr/share/OVMF/OVMF_VARS_4M.fd").read_bytes()
    contents = []
    for _ in range(2):
        arguments = vmctl_run(
            *("-m", "256M", "--firmware", "uefi", "--nvram", nvram, "-r", image, "-B", "cdrom")
        )
        with ConsoleProcess(arguments) as guest:
            guest.expect(shown("grub-is-up"), FIRMWARE_S)
            guest.expect(shown("grub>"), FIRMWARE_S)
        contents.append(nvram.read_bytes())
    assert len(contents[0]) == len(template)
    assert contents[0] != template
