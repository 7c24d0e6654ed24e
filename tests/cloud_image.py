"""A disk like Debian's image for clouds: cloud-init, sshd and systemd, and nothing set up.

mmdebstrap makes it of Debian 13, without a boot loader: tests boot its kernel themselves. It is
kept in the cache of `tests.artifacts`; it takes some minutes, the network and root to make.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.artifacts import ArtifactError, cache_dir, run_tool
from tests.packages.debian_tree import sources

SUITE = "trixie"
_SIZE = 1536 << 20
_PACKAGES = (
    *("linux-image-cloud-amd64", "initramfs-tools", "zstd", "kmod", "udev", "systemd-sysv"),
    *("e2fsprogs", "openssh-server", "cloud-init", "iproute2", "sudo"),
)
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_MODULES = ("virtio_pci", "virtio_blk", "ext4")
# Each costs seconds in the rig, and is no matter of a cloud's image.
_MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "getty@tty1.service"),
    *("systemd-tmpfiles-clean.timer", "systemd-pstore.service", "systemd-update-utmp.service"),
    *("sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-kernel-config.mount"),
    *("sys-fs-fuse-connections.mount", "dev-hugepages.mount", "dev-mqueue.mount"),
    *("modprobe@configfs.service", "modprobe@drm.service", "modprobe@fuse.service"),
    *("modprobe@efi_pstore.service", "modprobe@loop.service", "modprobe@dm_mod.service"),
    *("systemd-networkd-wait-online.service", "proc-sys-fs-binfmt_misc.automount"),
)
_HOOK = f"""#!/bin/sh
set -e
cd "$1"
echo localhost > etc/hostname
: > etc/machine-id
echo '/dev/vda / ext4 errors=remount-ro 0 1' > etc/fstab
echo MODULES=list > etc/initramfs-tools/conf.d/list
printf '%s\\n' {" ".join(_MODULES)} >> etc/initramfs-tools/modules
chroot . update-initramfs -u
for unit in {" ".join(_MASKED)}; do ln -sf /dev/null etc/systemd/system/$unit; done
rm -f etc/ssh/ssh_host_*
rm -rf var/lib/apt/lists/* var/cache/apt/*
: > etc/apt/sources.list
"""


class CloudImage(NamedTuple):
    """The raw image, whose first byte begins its file system, and what boots it."""

    disk: Path
    vmlinuz: Path
    initrd: Path


def cloud_image() -> CloudImage:
    """Return the image, made at the first call with this recipe.

    Raises:
        ArtifactError: it is not in the cache, and cannot be made: no root, no network, or a
            package is missing.
    """
    recipe = hashlib.sha256(repr((SUITE, _SIZE, _PACKAGES, _HOOK)).encode()).hexdigest()[:12]
    place = cache_dir() / f"cloud-{SUITE}-{recipe}"
    if not place.exists():
        if os.geteuid() != 0:
            raise ArtifactError(f"{place}: not made yet; run python -m tests.cloud_image as root")
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="making-") as scratch:
            _make(Path(scratch)).rename(place)
    return CloudImage(place / "disk.img", place / "vmlinuz", place / "initrd.img")


def _make(scratch: Path) -> Path:
    root, place, hook = scratch / "root", scratch / "image", scratch / "hook"
    place.mkdir()
    hook.write_text(_HOOK)
    hook.chmod(0o755)
    run_tool(
        *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", "--quiet"),
        *("--aptopt=Acquire::Retries 3", '--aptopt=APT::Install-Recommends "false"'),
        '--aptopt=Acquire::Check-Valid-Until "false"',
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT),
        f"--include={','.join(_PACKAGES)}",
        *("--customize-hook", str(hook), SUITE, str(root), *sources(SUITE)),
    )
    image = place / "disk.img"
    with image.open("wb") as file:
        file.truncate(_SIZE)
    run_tool("mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1", "-d", root, image)
    for name in ("vmlinuz", "initrd.img"):
        shutil.copy(root / name, place / name)
    return place


if __name__ == "__main__":
    try:
        print(cloud_image().disk)
    except ArtifactError as error:
        sys.exit(f"cloud image: {error}")
