"""A disk with Debian installed: root file system, kernel, GRUB for BIOS and for UEFI, and fio.

What an installation leaves, made without a VM: mmdebstrap fills a directory, `mke2fs -d` makes
the file system of it, and GRUB's two halves are put where grub-install would put them. It is kept
in the cache of `tests.artifacts`; it takes two minutes, the network and root to make.

A second one is also a server, with ssh, a web server and an address by DHCP: the image of
docs/tutorial.md, where all that is to be installed in it is there already.

root has no password. Units that a guest on a serial line does not need are masked, because in the
rig each costs seconds.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.artifacts import ArtifactError, cache_dir, run_tool

_MIB = 1 << 20
_SECTOR = 512
SIZE = 1024 * _MIB
LOGIN = r"debian login: "

_SUITE = "bookworm"
_PACKAGES = (
    *("linux-image-cloud-amd64", "initramfs-tools", "zstd", "kmod", "udev"),
    *("systemd-sysv", "e2fsprogs", "fio"),
)
_SERVER_PACKAGES = ("openssh-server", "lighttpd")
# Of a server; there are no sources, so that apt-get looks nowhere for packages.
_SERVER_HOOK = """
mkdir -p etc/systemd/network etc/systemd/system/multi-user.target.wants
printf '[Match]\\nName=e*\\n[Network]\\nDHCP=yes\\n' > etc/systemd/network/80-dhcp.network
ln -s /lib/systemd/system/systemd-networkd.service etc/systemd/system/multi-user.target.wants/
: > etc/apt/sources.list
rm -rf etc/apt/sources.list.d
"""
# Read by nobody in a guest; without them the image is smaller by a third.
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "getty@tty1.service"),
    *("systemd-tmpfiles-clean.timer", "systemd-pstore.service", "systemd-update-utmp.service"),
    *("systemd-update-utmp-runlevel.service", "systemd-journal-flush.service"),
    *("sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-kernel-config.mount"),
    *("sys-fs-fuse-connections.mount", "dev-hugepages.mount", "dev-mqueue.mount"),
    *("modprobe@configfs.service", "modprobe@drm.service", "modprobe@fuse.service"),
    *("modprobe@efi_pstore.service", "modprobe@loop.service", "modprobe@dm_mod.service"),
    *("systemd-logind.service", "systemd-user-sessions.service", "systemd-random-seed.service"),
    "proc-sys-fs-binfmt_misc.automount",
)
_MODULES = ("virtio_pci", "virtio_blk", "ext4")

_ROOT_UUID = "1f3c5e70-0d61-4b0e-9d53-7a52b1c0d501"
_BIOS_START, _ESP_START, _ROOT_START = 40, 2048, 2048 + 16384  # sectors
_ROOT_END = SIZE // _SECTOR - 2048
_PARTITIONS = f"""label: gpt
first-lba: 34
start={_BIOS_START}, size={_ESP_START - _BIOS_START}, type=21686148-6449-6E6F-744E-656564454649
start={_ESP_START}, size={_ROOT_START - _ESP_START}, type=uefi
start={_ROOT_START}, size={_ROOT_END - _ROOT_START}, type=linux
"""
_GRUB_MODULES = (
    *("part_gpt", "ext2", "normal", "configfile", "linux", "echo", "test", "search"),
    *("search_fs_uuid", "minicmd", "reboot", "halt"),
)
_GRUB_CONFIGURATION = f"""if [ "$grub_platform" = pc ]; then
    serial --unit=0 --speed=115200
    terminal_input serial
    terminal_output serial
fi
echo "grub: $grub_platform"
search --set=root --fs-uuid {_ROOT_UUID}
linux /vmlinuz root=UUID={_ROOT_UUID} ro console=ttyS0 quiet panic=-1
initrd /initrd.img
boot
"""
# Where the parts of a BIOS GRUB find each other. Source: GRUB's include/grub/i386/pc/boot.h,
# GRUB_BOOT_MACHINE_KERNEL_SECTOR, and grub-core/boot/i386/pc/diskboot.S, the last block list.
_KERNEL_SECTOR_AT = 0x5C
_BLOCK_LIST_AT = _SECTOR - 12
_BOOT_CODE_SIZE = 440


@dataclass(frozen=True, slots=True)
class Debian:
    """An installed system: the raw image, and its kernel and initramfs for booting without GRUB.

    `systemd` on the root file system takes most of a boot; `init=/bin/bash` on the kernel's
    command line leaves it out.
    """

    disk: Path
    vmlinuz: Path
    initrd: Path


def debian(*, is_server: bool = False) -> Debian:
    """Return the system, or the server, made at the first call with this recipe.

    Raises:
        ArtifactError: it is not in the cache, and cannot be made: no root, no network, or a
            package is missing.
    """
    place = cache_dir() / f"debian-{'server-' * is_server}{_recipe()}"
    if not place.exists():
        if os.geteuid() != 0:
            raise ArtifactError(f"{place}: not made yet; run python -m tests.debian as root")
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="making-") as scratch:
            _make(Path(scratch), is_server=is_server).rename(place)
    return Debian(place / "disk.img", place / "vmlinuz", place / "initrd")


def root_offset() -> int:
    """Return where the root file system begins in the image, bytes."""
    return _ROOT_START * _SECTOR


def _recipe() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def _make(scratch: Path, *, is_server: bool) -> Path:
    root, place = scratch / "root", scratch / "debian"
    place.mkdir()
    image = place / "disk.img"
    options = [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
    run_tool(
        *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", "--quiet"),
        *("--aptopt=Acquire::Retries 3", '--aptopt=APT::Install-Recommends "false"'),
        f"--include={','.join((*_PACKAGES, *(_SERVER_PACKAGES if is_server else ())))}",
        *(*options, "--customize-hook", _hook(scratch, _SERVER_HOOK if is_server else "")),
        *(_SUITE, root),
    )
    with image.open("wb") as file:
        file.truncate(SIZE)
    run_tool("sfdisk", "--quiet", image, text=_PARTITIONS)
    run_tool(
        *("mke2fs", "-q", "-F", "-t", "ext4", "-U", _ROOT_UUID, "-d", root),
        *("-E", f"offset={root_offset()},lazy_itable_init=1,nodiscard"),
        *(image, f"{(_ROOT_END - _ROOT_START) // 2}k"),
    )
    _install_bios(image, scratch)
    _install_uefi(image, scratch)
    for name in ("vmlinuz", "initrd.img"):
        shutil.copy(root / name, place / name.removesuffix(".img"))
    return place


def _hook(scratch: Path, more: str) -> str:
    """Return the shell script that mmdebstrap runs with the root directory as $1."""
    script = scratch / "hook"
    masks = " ".join(_MASKED)
    script.write_text(
        f"""#!/bin/sh
set -e
cd "$1"
echo debian > etc/hostname
echo 127.0.0.1 localhost debian > etc/hosts
echo 0123456789abcdef0123456789abcdef > etc/machine-id
echo 'UUID={_ROOT_UUID} / ext4 errors=remount-ro 0 1' > etc/fstab
sed -i 's/^root:[^:]*:/root::/' etc/shadow
echo MODULES=list > etc/initramfs-tools/conf.d/list
printf '%s\\n' {" ".join(_MODULES)} >> etc/initramfs-tools/modules
chroot . update-initramfs -u
for unit in {masks}; do ln -sf /dev/null etc/systemd/system/$unit; done
mkdir -p etc/systemd/journald.conf.d boot/grub
printf '[Journal]\\nStorage=volatile\\n' > etc/systemd/journald.conf.d/volatile.conf
cat > boot/grub/grub.cfg <<'END'
{_GRUB_CONFIGURATION}END
rm -rf var/lib/apt/lists/* var/cache/apt/* usr/lib/python3*
{more}"""
    )
    script.chmod(0o755)
    return str(script)


def _install_bios(image: Path, scratch: Path) -> None:
    """Put GRUB's first sector in front of the partitions, and the rest into its partition."""
    core_file = scratch / "core.img"
    _mkimage("i386-pc", core_file, "biosdisk", "serial", "terminal")
    core = bytearray(core_file.read_bytes())
    assert len(core) <= (_ESP_START - _BIOS_START) * _SECTOR
    struct.pack_into("<Q", core, _BLOCK_LIST_AT, _BIOS_START + 1)
    boot = bytearray(Path("/usr/lib/grub/i386-pc/boot.img").read_bytes())
    struct.pack_into("<Q", boot, _KERNEL_SECTOR_AT, _BIOS_START)
    with image.open("r+b") as file:
        file.write(boot[:_BOOT_CODE_SIZE])
        file.seek(_BIOS_START * _SECTOR)
        file.write(core)


def _install_uefi(image: Path, scratch: Path) -> None:
    """Make the EFI system partition, with GRUB where firmware looks without being told."""
    program = scratch / "BOOTX64.EFI"
    _mkimage("x86_64-efi", program)
    partition = f"{image}@@{_ESP_START * _SECTOR}"
    run_tool("mformat", "-i", partition, "-T", str(_ROOT_START - _ESP_START), "::")
    run_tool("mmd", "-i", partition, "::/EFI", "::/EFI/BOOT")
    run_tool("mcopy", "-i", partition, program, "::/EFI/BOOT/BOOTX64.EFI")


def _mkimage(target: str, output: Path, *modules: str) -> None:
    run_tool(
        *("grub-mkimage", "-O", target, "-o", output, "-p", "(hd0,gpt3)/boot/grub"),
        *(*_GRUB_MODULES, *modules),
    )


if __name__ == "__main__":
    try:
        for has_servers in (False, True):
            print(debian(is_server=has_servers).disk)
    except ArtifactError as error:
        sys.exit(f"debian: {error}")
