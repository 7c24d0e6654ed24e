"""VMs with encrypted memory (AMD SEV): what they cannot have, and what cannot be done to them."""

from vmd.config.disks import DiskKind
from vmd.config.model import VmConfig
from vmd.rules.policy import Denied
from vmd.wire.messages import ErrorCode

BIOS = "bios"
"""The name of firmware that knows no encrypted memory."""


def why_not_started(
    config: VmConfig, *, is_template: bool, continues: bool, has_image: bool
) -> str | None:
    """Return why a VM of this configuration cannot start with encrypted memory, if it cannot.

    Args:
        config: of a VM with `sev` or `seves`.
        is_template: clones are to continue from it.
        continues: it comes from a snapshot, another host, or another VM.
        has_image: a kernel or firmware comes along that `config` does not name.
    """
    if continues:
        return "it cannot continue from saved memory"
    if is_template:
        return "it cannot be a template"
    if config.has_balloon:
        return "not with balloon: memory that has to stay in its place cannot go back to the host"
    if any(disk.kind is DiskKind.PMEM for disk in config.disks):
        return "not with a disk of format pmem: the guest would share all of it"
    if not has_image and config.boot is None and (config.firmware or BIOS) == BIOS:
        return "it needs a kernel, or firmware uefi: with SeaBIOS, disks cannot reach its memory"
    return None


def why_denied(config: VmConfig, what: str) -> Denied | None:
    """Return the refusal of what needs to read a VM's memory, if that is encrypted.

    `what` completes "it cannot be".
    """
    if not config.is_sev:
        return None
    return Denied(ErrorCode.EINVAL, f"the VM's memory is encrypted: it cannot be {what}")
