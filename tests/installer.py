"""Debian's installer: its netboot images, and a mirror of a few packages for it.

The kernel and the initrd are those of a package, unchanged; an archive with answers to the
installer's questions follows the initrd. The mirror has Debian's own installer packages (udebs)
with drivers of that kernel for disks and a file system, and one of ours, which partitions. Debian's
own, partman, is a dozen packages, which not every mirror keeps; ours calls Debian's sfdisk and
mke2fs.

The images and udebs are downloaded once, with apt, into the cache of `tests.artifacts`: 135 MB.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.artifacts import ArtifactError, cache_dir
from tests.rig.initramfs import newc_entry

SUITE = "bookworm"
_NETBOOT = "debian-installer-12-netboot-amd64"
_IMAGES = "usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64"
# Drivers, whose names end in `-VERSION-di`, and those that they need.
_DRIVERS = (
    *("scsi-modules", "scsi-core-modules", "ata-modules", "cdrom-core-modules"),
    *("ext4-modules", "crc-modules"),
)
# The place of a kernel image's version. Source: Linux boot protocol 2.15, kernel_version.
_VERSION_AT, _VERSION_BASE = 0x20E, 0x200

# The label and the file that the step writes to the disk, and its last line on the console.
LABEL, MARK, DONE = "installed", "etc/hostname", "partition: done"
_STEP = "vmm-partition"
_TOOLS = f"usr/lib/{_STEP}"
_PROGRAMS = ("sfdisk", "mke2fs")
_LOADER = re.compile(r"^\s*(?:\S+ => )?(/\S+) \(0x", re.MULTILINE)
# The main menu calls it, as it calls every step of the installer.
_POSTINST = f"""#!/bin/sh
set -e
exec >/dev/console 2>&1
run() {{ program=$1; shift; /{_TOOLS}/loader --library-path /{_TOOLS} "/{_TOOLS}/$program" "$@"; }}
depmod -a
modprobe virtio_blk
modprobe ext4
udevadm settle
echo "partition: address $(ip -o -4 addr show | grep -v ' lo ' | tr -s ' ' | cut -d ' ' -f 4)"
echo "partition: name $(hostname)"
printf 'label: gpt\\n,,linux\\n' | run sfdisk /dev/vda
udevadm settle
run mke2fs -q -t ext4 -L {LABEL} /dev/vda1
mkdir -p /target
mount -t ext4 /dev/vda1 /target
mkdir -p /target/etc
hostname > /target/{MARK}
umount /target
echo {DONE}
sync
poweroff -f
"""
_CONTROL = f"""Package: {_STEP}
Version: 1
Architecture: amd64
Section: debian-installer
Priority: standard
Maintainer: nobody <nobody@localhost>
Installer-Menu-Item: 4200
Description: Partition a disk
"""
_TEMPLATES = f"""Template: debian-installer/{_STEP}/title
Type: text
Description: Partition a disk
"""

# Source: Debian installation guide, appendix B, Automating the installation using preseeding.
_ANSWERS = {
    "debian-installer/locale": "string en_US.UTF-8",
    "keyboard-configuration/xkb-keymap": "select us",
    "netcfg/choose_interface": "select auto",
    "hw-detect/load_firmware": "boolean false",
    "mirror/country": "string manual",
    "mirror/protocol": "string http",
    "mirror/http/directory": "string /debian",
    "mirror/http/proxy": "string",
    "mirror/suite": f"string {SUITE}",
    "debian-installer/allow_unauthenticated": "boolean true",
}
# On a more capable terminal the installer would run in screen(1).
COMMAND_LINE = "console=ttyS0 auto=true priority=critical DEBIAN_FRONTEND=text TERM=dumb"


@dataclass(frozen=True, slots=True)
class Installer:
    """The installer's kernel and initrd, and a folder of udebs for that kernel."""

    vmlinuz: Path
    initrd: Path
    udebs: Path


def installer() -> Installer:
    """Return the installer, downloaded at the first call.

    Raises:
        ArtifactError: it is not in the cache, and apt cannot fetch it.
    """
    place = cache_dir() / f"installer-{SUITE}"
    if not place.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="download-") as scratch:
            _download(Path(scratch)).rename(place)
    return Installer(place / "linux", place / "initrd.gz", place / "udebs")


def preseeded(found: Installer, mirror: str, path: Path) -> Path:
    """Write the initrd followed by the answers; `mirror` is the mirror's host."""
    answers = {**_ANSWERS, "mirror/http/hostname": f"string {mirror}"}
    text = "".join(f"d-i {question} {answer}\n" for question, answer in answers.items())
    archive = newc_entry(1, "preseed.cfg", stat.S_IFREG | 0o644, text.encode())
    packed = found.initrd.read_bytes()
    # The kernel looks for an archive at each multiple of 4 bytes.
    path.write_bytes(
        packed + bytes(-len(packed) % 4) + archive + newc_entry(0, "TRAILER!!!", 0, b"")
    )
    return path


def make_mirror(found: Installer, root: Path) -> None:
    """Make the folder `debian` below `root` a mirror of installer packages."""
    pool, index = root / "debian" / "pool", root / "debian" / "dists" / SUITE
    name = "main/debian-installer/binary-amd64/Packages"
    (index / name).parent.mkdir(parents=True)
    shutil.copytree(found.udebs, pool)
    _build_step(root / "step", pool / f"{_STEP}.udeb")
    packages = "\n".join(_paragraph(udeb) for udeb in sorted(pool.iterdir())).encode()
    (index / name).write_bytes(packages)
    # This file tells the installer that the mirror has this architecture.
    architecture = index / "main" / "binary-amd64"
    architecture.mkdir()
    (architecture / "Release").write_text("Component: main\nArchitecture: amd64\n")
    (index / "Release").write_text(
        f"Origin: test\nSuite: {SUITE}\nCodename: {SUITE}\nComponents: main\n"
        f"Architectures: amd64\nSHA256:\n {_sha256(packages)} {len(packages)} {name}\n"
    )


def _download(scratch: Path) -> Path:
    place = scratch / "installer"
    (place / "udebs").mkdir(parents=True)
    options = _apt_options(scratch)
    _run("apt-get", *options, "update", folder=scratch)
    _run("apt-get", *options, "download", _NETBOOT, folder=scratch)
    (package,) = scratch.glob(f"{_NETBOOT}_*.deb")
    _run("dpkg-deb", "-x", package, scratch / "tree", folder=scratch)
    for name in ("linux", "initrd.gz"):
        (scratch / "tree" / _IMAGES / name).rename(place / name)
    version = _kernel_version((place / "linux").read_bytes())
    udebs = [f"{driver}-{version}-di" for driver in _DRIVERS]
    _run("apt-get", *options, "download", *udebs, folder=place / "udebs")
    return place


def _apt_options(scratch: Path) -> list[str]:
    """Return options for an apt that reads the suite from the host's mirror, udebs included."""
    uris = _run(
        *("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"),
        *(f"Codename: {SUITE}", "Component: main", "Origin: Debian"),
        folder=scratch,
    ).split()
    if not uris:
        raise ArtifactError(
            f"installer: apt knows no suite {SUITE}; add it, and run apt-get update"
        )
    sources = scratch / "sources.list"
    sources.write_text(f"deb {uris[0]} {SUITE} main main/debian-installer\n")
    (scratch / "lists" / "partial").mkdir(parents=True)
    settings = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": scratch / "lists",
        "Dir::Cache": scratch / "apt-cache",
        "Acquire::Retries": 3,
        "APT::Sandbox::User": "root",
    }
    return ["-q", *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]


def _kernel_version(image: bytes) -> str:
    offset = _VERSION_BASE + int.from_bytes(image[_VERSION_AT:][:2], "little")
    return image[offset : offset + 256].split(b" ", 1)[0].decode("ascii")


def _build_step(tree: Path, udeb: Path) -> None:
    """Make our package: the host's programs, with the libraries that they need."""
    tools = tree / _TOOLS
    tools.mkdir(parents=True)
    for name in _PROGRAMS:
        program = shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
        if program is None:
            raise ArtifactError(f"{name}: not found; run make setup as root")
        shutil.copy(program, tools)
        for library in _LOADER.findall(_run("ldd", program, folder=tree)):
            shutil.copy(library, tools)
    (loader,) = tools.glob("ld-linux*")
    loader.rename(tools / "loader")
    control = tree / "DEBIAN"
    control.mkdir()
    (control / "control").write_text(_CONTROL)
    (control / "templates").write_text(_TEMPLATES)
    (control / "postinst").write_text(_POSTINST)
    (control / "postinst").chmod(0o755)
    _run("dpkg-deb", "--root-owner-group", "-Zxz", "--build", tree, udeb, folder=tree.parent)


def _paragraph(udeb: Path) -> str:
    """Return a package's paragraph in a mirror's index."""
    control = _run("dpkg-deb", "-f", udeb, folder=udeb.parent)
    data = udeb.read_bytes()
    return (
        f"{control.strip()}\nFilename: pool/{udeb.name}\nSize: {len(data)}\n"
        f"MD5sum: {hashlib.md5(data).hexdigest()}\nSHA256: {_sha256(data)}\n"
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _run(*command: str | Path, folder: Path) -> str:
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=folder
        ).stdout
    except FileNotFoundError as err:
        raise ArtifactError(f"{command[0]}: not found; run make setup as root") from err
    except subprocess.CalledProcessError as err:
        raise ArtifactError(f"{command[0]}: {err.stderr.strip()[-2000:]}") from err


if __name__ == "__main__":
    try:
        print(installer().vmlinuz.parent)
    except ArtifactError as error:
        sys.exit(f"installer: {error}")
