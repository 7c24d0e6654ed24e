"""Bootable CD-ROM images with boot loaders of distributions: GRUB, ISOLINUX, iPXE.

Each is built in less than a second, at each call; packages provide the parts.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.artifacts import ArtifactError

_ISOLINUX = (
    Path("/usr/lib/ISOLINUX/isolinux.bin"),
    Path("/usr/lib/syslinux/modules/bios/ldlinux.c32"),
)
# Code for the first sector; it boots the same image as a disk.
_ISOLINUX_MBR = Path("/usr/lib/ISOLINUX/isohdpfx.bin")
_IPXE = Path("/usr/lib/ipxe/ipxe.iso")
_IPXE_KERNEL = Path("/usr/lib/ipxe/ipxe.lkrn")
_GRUB_MODULES = (
    *("serial", "terminal", "iso9660", "ls", "echo", "normal", "minicmd", "configfile"),
    *("search", "part_msdos", "part_gpt", "linux", "halt", "reboot", "cat"),
)
_GRUB_PLATFORMS = {"bios": "i386-pc", "uefi": "x86_64-efi"}


def data_iso(path: Path, files: Mapping[str, bytes], *options: str) -> Path:
    """Write an ISO 9660 image that holds `files`; `options` are mkisofs's.

    Raises:
        ArtifactError: xorriso is not installed.
    """
    tree = path.with_suffix(".tree")
    for name, data in files.items():
        place = tree / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    _run("xorriso", "-as", "mkisofs", "-quiet", "-rock", "-o", path, *options, tree)
    shutil.rmtree(tree)
    return path


def isolinux_iso(path: Path, configuration: str, files: Mapping[str, bytes] | None = None) -> Path:
    """Write a disc that boots ISOLINUX on the BIOS's console, which also boots as a disk.

    (With a serial line in its configuration every character would appear twice: SeaBIOS's console
    is there too.)

    Raises:
        ArtifactError: xorriso, isolinux or syslinux-common is not installed.
    """
    content = {"isolinux/isolinux.cfg": f"{configuration}\n".encode(), **(files or {})}
    for part in (*_ISOLINUX, _ISOLINUX_MBR):
        if not part.exists():
            raise ArtifactError(f"{part}: not found; install isolinux and syslinux-common")
    for part in _ISOLINUX:
        content[f"isolinux/{part.name}"] = part.read_bytes()
    return data_iso(
        path,
        content,
        *("-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat"),
        *("-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"),
        *("-isohybrid-mbr", str(_ISOLINUX_MBR)),
    )


def grub_iso(path: Path, commands: str, *, firmware: str = "bios") -> Path:
    """Write a disc that boots GRUB, which also boots as a disk.

    `firmware` is bios or uefi; GRUB uses the serial port with bios, the firmware's console with
    uefi.

    Raises:
        ArtifactError: grub-common, its modules, xorriso or mtools are not installed.
    """
    serial = "serial --unit=0 --speed=115200\nterminal_input serial\nterminal_output serial\n"
    tree = path.with_suffix(".tree")
    (tree / "boot" / "grub").mkdir(parents=True)
    text = f"{serial if firmware == 'bios' else ''}{commands}\n"
    (tree / "boot" / "grub" / "grub.cfg").write_text(text)
    modules = Path("/usr/lib/grub") / _GRUB_PLATFORMS[firmware]
    if not modules.exists():
        raise ArtifactError(f"{modules}: not found; install grub-pc-bin and grub-efi-amd64-bin")
    _run(
        *("grub-mkrescue", "-o", path, "-d", modules, "--locales=", "--themes=", "--fonts="),
        f"--install-modules={' '.join(_GRUB_MODULES)}",
        tree,
    )
    shutil.rmtree(tree)
    return path


def ipxe_iso() -> Path:
    """Return Debian's iPXE disc, which also boots as a disk.

    Raises:
        ArtifactError: it is not installed.
    """
    if not _IPXE.exists():
        raise ArtifactError(f"{_IPXE}: not found; install the package ipxe")
    return _IPXE


def ipxe_script_iso(path: Path, commands: str) -> Path:
    """Write a disc that boots iPXE, which runs these commands.

    Raises:
        ArtifactError: ipxe, or something that `isolinux_iso` needs, is not installed.
    """
    if not _IPXE_KERNEL.exists():
        raise ArtifactError(f"{_IPXE_KERNEL}: not found; install the package ipxe")
    return isolinux_iso(
        path,
        "default ipxe\nlabel ipxe\nkernel /ipxe\ninitrd /script",
        {"ipxe": _IPXE_KERNEL.read_bytes(), "script": f"#!ipxe\n{commands}\n".encode()},
    )


def _run(*command: str | Path) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as err:
        raise ArtifactError(f"{command[0]}: not found; install grub-common and xorriso") from err
    except subprocess.CalledProcessError as err:
        raise ArtifactError(f"{command[0]}: {err.stderr.strip()}") from err
