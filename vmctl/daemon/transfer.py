"""`vmctl send`: a VM out of the daemon into a stream; and what a VM out of one needs of this host.

The daemon writes to standard output itself: nothing is copied here. Files of a VM that comes are
opened here, with the user's rights, as those of `start` are.

Different from OpenBSD: a VM that cannot be sent goes on, and the exit status is 1.

Source: section 3.10 of OpenBSD's behaviour.
"""

import os
import stat
import sys
from collections.abc import Mapping, Sequence

from vmctl.client import (
    Client,
    CommandError,
    Fields,
    RefusedError,
    parse_target,
)
from vmctl.daemon.starting import open_chain, open_file
from vmctl.messages import fail
from vmd.config.disks import DiskKind, DiskOption
from vmm_kvm.block.locks import is_written
from vmm_kvm.snapshot.manifest import Disk, Interface, Manifest
from vmm_kvm.text import printable

_STDOUT = 1
SENDER_PATIENCE_S = 1e6
"""For the beginning, in seconds: a sender on another host may be asked for a password first."""


def send(words: Sequence[str], *, keeps_running: bool = False) -> int:
    """Send a VM to standard output; returns the exit status."""
    try:
        target = parse_target(words[0])
        fd = _sink()
        try:
            with Client() as client:
                fields = {**target.fields(), "stream": 0, "keeps_running": keeps_running}
                client.ask("send", "done", fields, [fd])
        finally:
            os.close(fd)
    except RefusedError as err:
        return fail(f"send vm command failed: {err}")
    except CommandError as err:
        return fail(err)
    print(f"vmctl: sent vm {printable(target.name) or target.id} successfully", file=sys.stderr)
    return 0


def _sink() -> int:
    """Return a descriptor of standard output, which does not block if it is a pipe.

    It is another open file description then: the user's own stays blocking.
    """
    try:
        mode = os.fstat(_STDOUT).st_mode
        if os.isatty(_STDOUT):
            raise CommandError("standard output is a terminal: send into a file or a pipe")
        if stat.S_ISFIFO(mode):
            return os.open(f"/proc/self/fd/{_STDOUT}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return os.dup(_STDOUT)
    except OSError as err:
        raise CommandError(f"standard output: {err.strerror}") from err


def check_disks(manifest: Manifest, fields: Fields, fds: Sequence[int]) -> None:
    """Refuse a disk that the sender does not use: it is another one, on storage of this host's.

    Raises:
        CommandError: which.
    """
    for disk, found in zip(manifest.disks, fields["disks"], strict=True):
        if disk.is_read_only or not found["chain"]:
            continue
        if not is_written(fds[found["chain"][0]]):
            raise CommandError(
                f"disk {disk.path}: nobody writes to it: it is not the one that the VM has\n"
                "a VM that is handed over needs its disks on storage that both hosts share"
            )


def request_of(
    manifest: Manifest,
    fds: list[int],
    *,
    is_like: bool = False,
    copied: Mapping[int, int] | None = None,
) -> Fields:
    """Return what the VM needs; descriptors that it names are added to `fds`.

    One that `is_like` another VM has files as this one, except those in the snapshot. Disks that
    are `copied`, by their places, have these descriptors, which stay the caller's.
    """
    boot = manifest.boot
    fields: Fields = {
        "uid": manifest.owner.uid,
        "gid": manifest.owner.gid,
        "memory": manifest.memory_size,
        "cpus": manifest.cpus,
        "disks": [
            _disk(disk, None if is_like else fds, (copied or {}).get(place))
            if kept is None
            else _kept_disk(disk, kept, fds)
            for place, (disk, kept) in enumerate(zip(manifest.disks, _kept(manifest), strict=True))
        ],
        "interfaces": [_interface(each) for each in manifest.interfaces],
        "boot": boot.image or "",
        "firmware": boot.firmware or "",
        "initrd": boot.initrd,
        "append": boot.append,
        "boot_device": boot.device,
        "has_vsock": manifest.vsock_cid is not None,
        "has_balloon": manifest.has_balloon,
        "has_watchdog": manifest.has_watchdog,
    }
    if manifest.cdrom is not None:
        fields["cdrom"] = manifest.cdrom
        if not is_like:
            fields["cdrom_image"] = open_file(manifest.cdrom, "iso image", fds)
    return fields


def _kept(manifest: Manifest) -> Sequence[tuple[int, int] | None]:
    return manifest.kept or (None,) * len(manifest.disks)


def _kept_disk(disk: Disk, kept: tuple[int, int], fds: list[int]) -> Fields:
    """Return a disk that is in the snapshot, whose descriptor is the first: it is only read."""
    fds.append(os.dup(fds[0]))
    return {
        "path": disk.path,
        "chain": [len(fds) - 1],
        "format": "raw",
        "is_snapshot": True,
        "window": kept,
        "serial": disk.serial,
        "queues": disk.queues,
    }


def _disk(disk: Disk, fds: list[int] | None, copied: int | None) -> Fields:
    try:
        kind = DiskKind(disk.kind)
    except ValueError:
        raise CommandError(f"invalid disk: {disk.path}: unknown kind {disk.kind}") from None
    option = DiskOption(
        kind, disk.path, disk.is_read_only, disk.serial, disk.queues, is_private=disk.is_private
    )
    chain: list[int] = []
    if fds is None:
        pass
    elif copied is not None:
        chain = [len(fds)]
        fds.append(os.dup(copied))
    elif kind is DiskKind.PMEM:
        writes = not disk.is_private
        chain = [open_file(disk.path, "disk", fds, writes=writes, allows_devices=True)]
    elif kind is not DiskKind.VHOST_USER:
        chain = open_chain(option, fds)
    return {
        "path": disk.path,
        "chain": chain,
        "format": disk.kind,
        "is_read_only": disk.is_read_only,
        "serial": disk.serial,
        "queues": disk.queues,
        "is_private": disk.is_private,
    }


def _interface(interface: Interface) -> Fields:
    return {
        "lladdr": interface.lladdr,
        "is_local": interface.is_local,
        "switch": interface.switch or "",
        "group": interface.group or "",
        "rdomain": interface.rdomain,
        "is_locked": interface.is_locked,
        "is_up": interface.is_up,
        "mtu": interface.mtu,
        "queues": interface.queues,
    }
