"""The places of firmware in distributions, by the names that users give it.

Nothing is shipped but the self-test guest: see bios/README.md.
"""

from pathlib import Path
from typing import NamedTuple

from vmm_kvm.errors import BootError

BIOS, UEFI = "bios", "uefi"


class Firmware(NamedTuple):
    """A firmware image, by path."""

    code: str
    variables: str | None = None
    """Initial contents of its flash memory; None for firmware that keeps nothing there."""


# In order of preference. Debian, then other distributions.
KNOWN = {
    BIOS: (
        Firmware("/usr/share/seabios/bios-256k.bin"),
        Firmware("/usr/share/qemu/bios-256k.bin"),
        Firmware("/usr/share/seabios/bios.bin"),
    ),
    UEFI: (
        Firmware("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
        Firmware("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
        Firmware("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
        Firmware("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ),
}
_PACKAGES = {BIOS: "seabios", UEFI: "ovmf"}


def find_firmware(wanted: str) -> Firmware:
    """Return the firmware that `wanted` names: `bios`, `uefi`, or the path of an image.

    A path that is one of those known for UEFI brings its variables along.

    Raises:
        BootError: none is installed, or it is neither of the names nor a file.
    """
    if wanted not in KNOWN:
        if "/" not in wanted and not _exists(wanted):
            raise BootError(f"no firmware {wanted}: use bios, uefi, or the path of an image")
        known = (firmware for each in KNOWN.values() for firmware in each)
        return next((each for each in known if each.code == wanted), Firmware(wanted))
    for firmware in KNOWN[wanted]:
        if _exists(firmware.code) and (firmware.variables is None or _exists(firmware.variables)):
            return firmware
    raise BootError(
        f"no {wanted.upper()} firmware found: install the package {_PACKAGES[wanted]}, "
        "or name an image"
    )


def _exists(path: str) -> bool:
    return Path(path).is_file()


def selftest_path() -> str:
    """Return where the self-test guest's image lies: in the package, or in a source tree."""
    package = Path(__file__).parents[1]
    packaged = package / "bios" / "selftest.bin"
    return str(packaged if packaged.exists() else package.parent / "bios" / "selftest.bin")
