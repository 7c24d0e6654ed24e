"""The disks of `vmctl run`: from the command line to the machine's devices.

Images are opened once and outlive reboots. Each machine makes a new connection to a disk's process,
which then has the new machine's memory.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from vmctl.images.store import stored_disk
from vmd.config.disks import (
    DiskError,
    DiskKind,
    DiskOption,
    OnError,
    check_distinct,
    parse_disk,
)
from vmm_kvm.absolute import absolute
from vmm_kvm.block.image import Format, Image
from vmm_kvm.errors import SpecError
from vmm_kvm.images.opening import open_disc, open_image
from vmm_kvm.virtio.blk import BlkSpec, VirtioBlk

if TYPE_CHECKING:  # loaded if a disk is in another process
    import socket

    from vmm_kvm.machine.spec import DiskSpec
    from vmm_kvm.virtio.scsi import ScsiCdSpec


def open_disk(text: str, index: int, stack: ExitStack) -> "DiskSpec":
    """Open disk number `index`, given as `-d` takes it; `stack` closes it.

    Raises:
        SpecError: it cannot be understood.
        ImageError: the image cannot be opened.
    """
    option = _parse(text)
    name = f"disk{index}"
    if option.kind is DiskKind.VHOST_USER:
        return _remote(lambda: connect_server(option.path), name)
    if option.kind is DiskKind.PMEM:
        from vmm_kvm.block.mapped import MappedImage  # noqa: PLC0415 - few disks are memory
        from vmm_kvm.virtio.pmem import PmemSpec  # noqa: PLC0415 - the same

        mapped = MappedImage(option.path, is_private=option.is_private)
        return PmemSpec(stack.enter_context(mapped), name)
    scratch = _scratch(stack) if option.is_snapshot else None
    if option.is_process:
        process = _ProcessDisk(option, name, scratch)
        stack.callback(process.close)
        return _remote(process.connect, name, may_halt=True)
    image = _open(option, scratch)
    stack.callback(_close, image, option.path)
    return BlkSpec(image, name, option.serial, option.queues, _stops(option))


def _stops(option: DiskOption) -> bool:
    """Tell whether faults of the host pause the VM: only if asked for."""
    return option.on_error is OnError.STOP


def _remote(
    connect: "Callable[[], socket.socket]", name: str, *, may_halt: bool = False
) -> "DiskSpec":
    from vmm_kvm.virtio.vhost_user.blk import RemoteBlkSpec  # noqa: PLC0415 - as sockets are

    return RemoteBlkSpec(connect, name, may_halt)


def refuse_twice(texts: Sequence[str]) -> None:
    """Refuse one image as two disks, given as `-d` takes them; see `check_distinct`.

    Raises:
        SpecError: there is one, or a disk cannot be understood.
    """
    disks = [_parse(text) for text in texts]
    try:
        check_distinct(
            [disk._replace(path=os.path.realpath(absolute(disk.path))) for disk in disks]
        )
    except DiskError as err:
        raise SpecError(str(err)) from None


def _parse(text: str) -> DiskOption:
    try:
        return stored_disk(parse_disk(text))
    except DiskError as err:
        raise SpecError(str(err)) from None


def open_cdrom(path: str, stack: ExitStack) -> "ScsiCdSpec":
    """Open the CD-ROM drive's image, always raw and never written; `stack` closes it.

    Raises:
        ImageError: the image cannot be opened.
    """
    from vmm_kvm.virtio.scsi import ScsiCdSpec  # noqa: PLC0415 - few machines have a drive

    image = open_disc(path)
    stack.callback(_close, image, path)
    return ScsiCdSpec(image)


def _scratch(stack: ExitStack) -> int:
    """Make a file without a name, which `stack` closes, in TMPDIR or /var/tmp.

    Raises:
        SpecError: it cannot be made.
    """
    from vmm_kvm.scratch import open_scratch, scratch_directory  # noqa: PLC0415 - few need it

    try:
        scratch = open_scratch()
    except OSError as err:
        raise SpecError(f"{scratch_directory()}: {err.strerror}") from err
    stack.callback(os.close, scratch)
    return scratch


def _open(option: DiskOption, scratch: int | None) -> Image:
    """Open an image; writes go to the file at `scratch`, if there is one."""
    disk_format = None if option.kind is DiskKind.PROBE else Format(option.kind)
    if scratch is not None and not option.is_read_only:
        from vmm_kvm.images.create import open_snapshot  # noqa: PLC0415 - few disks need it

        return open_snapshot(option.path, disk_format, scratch)
    return open_image(option.path, disk_format, option.is_read_only)


def _close(image: Image, path: str) -> None:
    """Close an image at the very end; a failure to write it back does not change the status."""
    try:
        image.close()
    except OSError as err:
        print(f"vmctl: {path}: {err.strerror}", file=sys.stderr)


def connect_server(path: str) -> "socket.socket":
    """Connect to a vhost-user server.

    Raises:
        SpecError: it does not listen there.
    """
    import socket  # noqa: PLC0415 - see above

    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError as err:
        connection.close()
        raise SpecError(f"vhost-user:{path}: {err.strerror or err}") from err
    return connection


class _ProcessDisk:
    """A disk with a process of its own for each machine."""

    def __init__(self, option: DiskOption, name: str, scratch: int | None) -> None:
        self._option = option
        self._scratch = scratch
        self._name = name
        self._close = ExitStack()

    def connect(self) -> "socket.socket":
        """Start the process, when the one before has ended: the image has one writer.

        Raises:
            VmmError: it cannot open the image.
        """
        from vmm_kvm.virtio.vhost_user.process import (  # noqa: PLC0415 - as sockets are
            spawn_device_process,
        )

        self.close()
        keep_fds = () if self._scratch is None else (self._scratch,)
        process = self._close.enter_context(
            spawn_device_process(self._backend, self._name, keep_fds)
        )
        return process.connection

    def close(self) -> None:
        """Wait for the process to end; its connection is closed."""
        self._close.close()

    def _backend(self) -> VirtioBlk:
        """Make the device; in its process."""
        option = self._option
        return VirtioBlk(
            _open(option, self._scratch),
            name=self._name,
            serial=option.serial,
            queues=option.queues,
            stops_at_errors=_stops(option),
        )
