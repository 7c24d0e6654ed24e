"""`vmctl start --save`: a VM's options as a file of the daemon's configuration.

The file is written with the rights of the command's user, beside the daemon's own, and the daemon
reads it like any other: errors are reported before the VM starts.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from vmctl.client import Client, CommandError, Fields
from vmd.config.disks import DiskOption
from vmd.config.model import Config, ForwardConfig, InterfaceConfig, Right, VmConfig
from vmd.config.seeds import SeedOption
from vmd.config.shares import ShareOption
from vmd.config.text import config_lines
from vmm_kvm.boot_device import BootDevice


def save(
    client: Client,
    name: str,
    fields: Fields,
    disks: Sequence[DiskOption],
    initrd: Sequence[str],
    *,
    seed: SeedOption | None,
) -> None:
    """Write a VM's file, and have the daemon read it, which starts the VM in its turn.

    Args:
        client: to ask the daemon.
        name: the VM's.
        fields: of the request to start it.
        disks: its disks, with absolute paths.
        initrd: absolute paths of its initial RAM disks.
        seed: that the daemon makes for it, with absolute paths.

    Raises:
        CommandError: there is such a file or VM, it cannot be written, or the daemon refuses it.
    """
    if not name:
        raise CommandError("--save needs a name, not an id")
    source = client.ask("source", "source-is")
    directory = source["directory"]
    if not directory:
        wanted = Path(source["path"]).parent / "vm.conf.d"
        raise CommandError(
            f'{source["path"]} does not include {wanted}\nadd the line: include "{wanted}/*.conf"'
        )
    if any(vm["name"] == name for vm in client.vms()):
        raise CommandError(f"there is a VM {name} already: --save is for a new one")
    path = f"{directory}/{name}.conf"
    text = (
        "\n".join(
            config_lines(Config(vms=(_config(name, fields, disks, initrd)._replace(seed=seed),)))
        )
        + "\n"
    )
    _write(path, text)
    try:
        client.ask("load", "done", {"path": path})
    except CommandError:
        Path(path).unlink()
        raise


def _write(path: str, text: str) -> None:
    """Write a new file, completely or not at all.

    Raises:
        CommandError: it cannot be written.
    """
    temporary = f"{path}.new"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, os.fsencode(text))
            os.fsync(fd)
            os.link(temporary, path)
        finally:
            os.close(fd)
            Path(temporary).unlink()
    except OSError as err:
        raise CommandError(f"{path}: {err.strerror}") from err


def _config(
    name: str, fields: Fields, disks: Sequence[DiskOption], initrd: Sequence[str]
) -> VmConfig:
    cdrom = fields.get("cdrom")
    return VmConfig(
        name,
        parent=fields.get("instance"),
        memory=fields.get("memory"),
        cpus=fields.get("cpus"),
        boot=fields.get("kernel_path"),
        initrd=tuple(initrd),
        append=fields.get("append"),
        firmware=fields.get("firmware"),
        has_vsock=fields.get("has_vsock", False),
        has_balloon=fields.get("has_balloon", False),
        has_watchdog=fields.get("has_watchdog", False),
        has_tpm=fields.get("has_tpm", False),
        boot_device=BootDevice(fields.get("boot_device", BootDevice.AUTO)),
        disks=tuple(disks),
        cdrom=cdrom,
        shares=tuple(
            ShareOption(one["path"], one["tag"], one["is_read_only"])
            for one in fields.get("shares", ())
        ),
        interfaces=tuple(map(_interface, fields.get("interfaces", ()))),
        given=frozenset({Right.CDROM} if cdrom else ()),
    )


def _interface(wanted: Fields) -> InterfaceConfig:
    forwards = (
        ForwardConfig(one["protocol"], one["port"], one["to_port"], one["address"])
        for one in wanted.get("forwards", ())
    )
    return InterfaceConfig(
        is_local=wanted.get("is_local", False),
        switch=wanted.get("switch"),
        forwards=tuple(forwards),
    )
