"""Disks of `vmctl start`: from `-d` to the request's fields, and to open files."""

from collections.abc import Sequence

from vmctl.client import CommandError, Fields
from vmctl.daemon.starting import open_chain, path_of, shown
from vmctl.images.store import stored_disk
from vmd.config.disks import (
    DiskError,
    DiskKind,
    DiskOption,
    check_distinct,
    parse_disk,
)


def read_disks(texts: Sequence[str]) -> list[DiskOption]:
    """Return the disks, each of them an image, with absolute paths.

    Raises:
        CommandError: one is not understood, is no image, or comes twice.
    """
    disks = [_disk(text) for text in texts]
    try:
        check_distinct(disks)
    except DiskError as err:
        raise CommandError(str(err)) from None
    return disks


def disk_fields(disk: DiskOption) -> Fields:
    """Return a disk's fields of a request, without its files."""
    return {
        "path": shown(disk.path),
        "format": str(disk.kind),
        "is_read_only": disk.is_read_only,
        "serial": disk.serial,
        "queues": disk.queues,
        **({} if disk.on_error is None else {"error": str(disk.on_error)}),
        **({"is_snapshot": True} if disk.is_snapshot else {}),
    }


def open_disks(disks: Sequence[DiskOption], named: Sequence[Fields], fds: list[int]) -> None:
    """Open the images of `disks` and their bases; `named` has the fields of each."""
    for disk, fields in zip(disks, named, strict=True):
        fields["chain"] = open_chain(disk, fds)


def _disk(text: str) -> DiskOption:
    try:
        disk = stored_disk(parse_disk(text))
    except DiskError as err:
        raise CommandError(str(err)) from None
    if disk.kind not in {DiskKind.PROBE, DiskKind.RAW, DiskKind.QCOW2}:
        raise CommandError(f"invalid disk: {text}: only for 'vmctl run' and vm.conf")
    return disk._replace(path=path_of(disk.path, "disk"))
