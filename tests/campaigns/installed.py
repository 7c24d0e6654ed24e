"""Campaign: an installed Debian, on disks of every kind, and fio's verified load on each of them.

It needs a KVM that runs a distribution kernel; the rig is one. Each part prints its seconds:

- `boot`: a qcow2 image made by `vmctl create` boots twice through SeaBIOS and GRUB to its login
  prompt; so do a raw image, an overlay on a read-only base, and a disk with a device process.
  After each, e2fsck and `qemu-img check` find nothing.
- `uefi`: the same image twice through OVMF.
- `fio`: random writes, trims and flushes, verified by checksums, on raw, qcow2, overlays of plain
  and compressed bases, a device process, qemu-storage-daemon's server; and by QEMU, on its own
  disks and on one of vmm-blk's. `qemu-img compare` finds our images equal to QEMU's.

The first deviation ends the campaign with its text and status 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests import debian, installed  # noqa: E402 - found by the line above


def boot(system: debian.Debian, folder: Path) -> None:
    """Boot each kind of disk through SeaBIOS and GRUB."""
    image, raw = folder / "disk.qcow2", folder / "disk.raw"
    installed.create("-i", system.disk, image)
    for number in (1, 2):
        _timed(f"boot {number} of qcow2", lambda: installed.boot_to_login(f"qcow2:{image}"))
        installed.check_qcow2(image, raw)
        assert installed.boots(raw) == number
    _timed("boot of raw", lambda: installed.boot_to_login(f"raw:{raw}"))
    installed.check_file_system(raw)
    assert installed.boots(raw) == 3
    raw.unlink()
    image.chmod(0o400)
    before = image.stat().st_mtime_ns
    overlay = folder / "overlay.qcow2"
    installed.create("-b", image, overlay)
    _timed("boot of an overlay", lambda: installed.boot_to_login(f"qcow2:{overlay}"))
    installed.check_qcow2(overlay, raw)
    assert installed.boots(raw) == 3
    _timed("boot by a device process", lambda: installed.boot_to_login(f"qcow2:{overlay},process"))
    installed.check_qcow2(overlay, raw)
    assert installed.boots(raw) == 4
    assert image.stat().st_mtime_ns == before


def uefi(system: debian.Debian, folder: Path) -> None:
    """Boot through OVMF and GRUB."""
    image, raw = folder / "disk.qcow2", folder / "disk.raw"
    installed.create("-i", system.disk, image)
    options = installed.firmware_options("efi", folder / "nvram")
    for number in (1, 2):
        _timed(
            f"boot {number} by UEFI",
            lambda: installed.boot_to_login(f"qcow2:{image}", *options, firmware="efi"),
        )
        installed.check_qcow2(image, raw)
        assert installed.boots(raw) == number


def fio(system: debian.Debian, folder: Path) -> None:
    """Put fio's load on each kind of disk."""
    installed.whole_fio(system, folder, megabytes=4)
    print("images of ours and of QEMU: identical", flush=True)


PARTS = {"boot": boot, "uefi": uefi, "fio": fio}


def _timed(what: str, action: Callable[[], None]) -> None:
    begun = time.monotonic()
    action()
    print(f"{what}: {time.monotonic() - begun:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named parts, by default all."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args(arguments)
    system = debian.debian()
    memory = Path("/dev/shm")
    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="installed-", dir=memory) as directory:
            try:
                PARTS[part](system, Path(directory))
            except AssertionError as error:
                print(f"{part}: {error}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
