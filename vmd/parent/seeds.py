"""Seeds of VMs of the configuration: their files are read, and their disks made, at each boot.

The disk has a place of its own by the VM's name, in the directory of what VMs keep, because what
goes on from a snapshot has to find it. It is written with the daemon's rights, and read by root, or
the user of `vmd --user`, alone: user-data may hold secrets.
"""

import os

from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import Config, VmConfig
from vmd.config.seeds import SeedOption
from vmd.parent.errors import ResourceError
from vmd.shared.seed import seed_image
from vmd.wire.messages import ErrorCode
from vmm_kvm.errors import SpecError
from vmm_kvm.new_file import NewFile, write_whole


def seed_path(state: str | None, name: str) -> str:
    """Return the path of a VM's seed; `state` is the directory of what VMs keep."""
    return f"{state or ''}/{name}.seed"


def with_seeds(config: Config, state: str | None) -> Config:
    """Return a configuration whose VMs have their seeds as their last disks."""
    return config._replace(vms=tuple(_with_seed(vm, state) for vm in config.vms))


def _with_seed(vm: VmConfig, state: str | None) -> VmConfig:
    if vm.seed is None:
        return vm
    disk = DiskOption(DiskKind.RAW, seed_path(state, vm.name), is_read_only=True)
    return vm._replace(disks=(*vm.disks, disk))


def make_seed(state: str | None, name: str, option: SeedOption) -> None:
    """Write the seed of a VM, unless it is there as it should be.

    Raises:
        ResourceError: a file of it cannot be read or makes no sense, or it cannot be written.
    """
    if state is None:
        raise ResourceError(ErrorCode.EIO, "no directory for seeds: HOME is not set")
    path = seed_path(state, name)
    try:
        image = seed_image(name, option)
        if _contents(path, len(image)) == image:
            return
        os.makedirs(state, mode=0o700, exist_ok=True)  # noqa: PTH103 - as the other paths here
        with NewFile(path, replaces=True) as file:
            write_whole(file.fd, [image])
            file.publish()
    except SpecError as err:
        raise ResourceError(ErrorCode.EINVAL, f"seed: {err}") from err
    except OSError as err:
        raise ResourceError(ErrorCode.EIO, f"seed {path}: {err.strerror}") from err


def _contents(path: str, size: int) -> bytes:
    """Return the contents of a seed; at most a byte more than so many, and none if it is absent."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return b""
    with os.fdopen(fd, "rb") as file:
        return file.read(size + 1)
