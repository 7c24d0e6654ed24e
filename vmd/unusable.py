"""Warnings of `vmd -n` about what a VM could not use: disks, kernels, firmware, directories.

They are read with the rights of whoever asks, which are root's for the daemon of root.
"""

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmd.config.disks import DiskKind
from vmd.config.model import VmConfig
from vmd.shared.seed import seed_image
from vmm_kvm.arch.x86.boot_config import BootConfig, refuse
from vmm_kvm.arch.x86.image import FirmwareImage, open_firmware, open_image
from vmm_kvm.block.image import Format
from vmm_kvm.boot.firmware import find_firmware
from vmm_kvm.errors import BootError, ImageError, SpecError
from vmm_kvm.images.opening import image_chain, open_disc

_FORMATS = {DiskKind.PROBE: None, DiskKind.RAW: Format.RAW, DiskKind.QCOW2: Format.QCOW2}


def unusable(vms: Sequence[VmConfig]) -> list[str]:
    """Return a line, `file:line: warning: text`, for each image that VMs could not use."""
    return [
        f'{vm.where}: warning: vm "{vm.name}": {text}' if vm.where else f"warning: {text}"
        for vm in vms
        for text in (*_disks(vm), *_boot(vm), *_shares(vm), *_seed(vm))
    ]


def _disks(vm: VmConfig) -> Iterator[str]:
    for disk in vm.disks:
        if disk.kind in _FORMATS:
            try:
                image_chain(disk.path, _FORMATS[disk.kind])
            except ImageError as err:
                yield f"disk {err}"
    if vm.cdrom is not None:
        try:
            open_disc(vm.cdrom).close()
        except ImageError as err:
            yield f"cdrom {err}"


def _shares(vm: VmConfig) -> Iterator[str]:
    for share in vm.shares:
        try:
            mode = Path(share.path).stat().st_mode
        except OSError as err:
            yield f"share {share.path}: {err.strerror}"
            continue
        if not (stat.S_ISSOCK(mode) if share.is_server else stat.S_ISDIR(mode)):
            yield f"share {share.path}: not a {'socket' if share.is_server else 'directory'}"


def _seed(vm: VmConfig) -> Iterator[str]:
    if vm.seed is not None:
        try:
            seed_image(vm.name, vm.seed)
        except SpecError as err:
            yield f"seed: {err}"


def _boot(vm: VmConfig) -> Iterator[str]:
    try:
        if vm.boot is not None:
            name, is_firmware = vm.boot, isinstance(open_image(vm.boot), FirmwareImage)
        elif vm.firmware is not None:
            name, is_firmware = vm.firmware, True
            open_firmware(find_firmware(vm.firmware).code)
        else:
            return
        if is_firmware:
            given = BootConfig(command_line=vm.append, initrd=vm.initrd)
            refuse(name, "firmware", given, command_line=True, initrd=True)
    except BootError as err:
        yield f"boot {err}"
