"""Files of a VM that are a client's: passed with the request to start it, or named in it.

They are checked before use, and those that are only named are opened with the client's rights. So
are the bases of a configured disk without a format: the VM's owner may have written its header.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import assert_never

from vmd.config.disks import DiskKind, DiskOption, writes_image
from vmd.config.model import GuestClock, Right
from vmd.parent.openers import Openers
from vmd.rules.policy import Users
from vmd.rules.vm import Passed, Vm
from vmd.shared.files import FileError, open_file
from vmd.shared.opening import OpeningError
from vmd.wire.channel import Fds
from vmd.wire.files import FileUse, FoundFile, WantedFile
from vmd.wire.messages import ErrorCode, Start
from vmd.wire.transfers import Receive, Send, Snapshot
from vmm_kvm.boot.firmware import KNOWN


def take_passed(request: Start | Send | Receive | Snapshot, uid: int, fds: Fds) -> Passed | None:
    """Take the open files of the client `uid`; all or nothing.

    Raises:
        MalformedError: it names descriptors that did not come along.
        DescriptorsLostError: this process has none left.
    """
    with ExitStack() as stack:

        def take(index: int) -> int:
            fd = fds.take(index)
            stack.callback(os.close, fd)
            return fd

        passed = _passed(request, uid, take)
        stack.pop_all()
    return passed if passed.fds else None


def _passed(
    request: Start | Send | Receive | Snapshot, uid: int, take: Callable[[int], int]
) -> Passed:
    match request:
        case Send():
            replies = None if request.replies is None else take(request.replies)
            return Passed(uid=uid, stream=take(request.stream), replies=replies)
        case Snapshot():
            return Passed(uid=uid, stream=None if request.file is None else take(request.file))
        case Receive():
            return Passed(
                uid=uid,
                cdrom=None if request.cdrom_image is None else take(request.cdrom_image),
                disks=tuple(tuple(map(take, disk.chain)) for disk in request.disks),
                stream=take(request.stream),
                manifest=request.manifest,
                stays_paused=request.stays_paused,
                is_snapshot=request.is_snapshot,
                is_copy=request.is_copy,
                clock=request.clock or GuestClock.NOW,
                replies=None if request.replies is None else take(request.replies),
            )
        case Start():
            kernel = None if request.kernel is None else take(request.kernel)
            return Passed(
                uid=uid,
                kernel=kernel,
                path=request.kernel_path or "kernel",
                initrd=() if kernel is None else tuple(map(take, request.initrd)),
                append=request.append,
                cdrom=None if request.cdrom_image is None else take(request.cdrom_image),
                disks=tuple(tuple(map(take, disk.chain)) for disk in request.disks),
                shares=tuple(
                    None if share.directory is None else take(share.directory)
                    for share in request.shares
                ),
            )
        case _:
            assert_never(request)


class ClientFiles:
    """Files to open or check for one start of a VM."""

    def __init__(self, vm: Vm, users: Users) -> None:
        """Collect them; this opens nothing but configured disks whose bases are followed.

        Raises:
            OpeningError: such a disk is not to be had.
        """
        passed = vm.files
        self._vm = vm
        self._passed = passed or Passed(uid=vm.requester)
        self.uid = self._passed.uid
        """With whose rights."""
        self.wanted: list[WantedFile] = []
        self.fds: list[int] = []
        """The descriptors that `wanted` indexes; the caller's."""
        self._places: list[tuple[FileUse, int]] = []
        if passed and passed.is_judged:
            return
        try:
            self._boot()
            self._cdrom()
            for index, option in enumerate(vm.config.disks):
                self._disk(index, option, users)
        except BaseException:
            Fds(self.fds).close()
            raise

    def _add(self, use: FileUse, place: int, path: str, fds: Sequence[int] = ()) -> None:
        self._want(WantedFile(use=use, path=path), place, [os.dup(fd) for fd in fds])

    def _want(self, wanted: WantedFile, place: int, fds: list[int]) -> None:
        first = len(self.fds)
        self.fds += fds
        indices = tuple(range(first, len(self.fds)))
        self.wanted.append(
            WantedFile(
                use=wanted.use,
                path=wanted.path,
                passed=indices,
                follows_bases=wanted.follows_bases,
                writes=wanted.writes,
                format=wanted.format,
                locks=wanted.locks,
            )
        )
        self._places.append((wanted.use, place))

    def _is_named(self, right: Right) -> bool:
        """Tell whether the client has named such files."""
        return right in self._vm.checked

    def _boot(self) -> None:
        config, passed = self._vm.config, self._passed
        if passed.kernel is not None:
            self._add(FileUse.BOOT, 0, passed.path, [passed.kernel])
            for index, fd in enumerate(passed.initrd):
                self._add(FileUse.INITRD, index, "initrd", [fd])
        elif self._is_named(Right.BOOT):
            for index, path in enumerate(config.initrd):
                self._add(FileUse.INITRD, index, path)
            if config.boot is not None:
                self._add(FileUse.BOOT, 0, config.boot)
            elif config.firmware is not None and config.firmware not in KNOWN:
                self._add(FileUse.FIRMWARE, 0, config.firmware)

    def _cdrom(self) -> None:
        path, passed = self._vm.config.cdrom, self._passed.cdrom
        if passed is not None:
            self._add(FileUse.CDROM, 0, path or "cdrom", [passed])
        elif path is not None and self._is_named(Right.CDROM):
            self._add(FileUse.CDROM, 0, path)

    def _disk(self, index: int, option: DiskOption, users: Users) -> None:
        if option.kind is DiskKind.VHOST_USER:  # no file; only vm.conf can have it
            return
        chain = self._passed.disks[index] if index < len(self._passed.disks) else ()
        wanted = wanted_disk(option, locks=not self._passed.has_sender)
        if chain:
            self._want(wanted, index, [os.dup(fd) for fd in chain])
        elif self._is_named(Right.DISK):
            self._want(wanted, index, [])
        elif option.kind is DiskKind.PROBE:
            owner = self._vm.config.owner.uid
            if owner is None or owner in users.administrators:
                return
            self.uid = owner
            try:
                image = open_file(option.path, writes=wanted.writes, allows_devices=True)
            except FileError as err:
                text = f"disk {option.path}: {err}"
                raise OpeningError(ErrorCode.DISK_MISSING, text) from err
            self._want(
                WantedFile(
                    use=wanted.use,
                    path=option.path,
                    follows_bases=True,
                    writes=wanted.writes,
                    locks=wanted.locks,
                ),
                index,
                [image],
            )

    def judged(self, found: Sequence[FoundFile], fds: Sequence[int]) -> Passed:
        """Return the VM's files once they are open: `fds`, which `found` indexes."""
        config, kernel, cdrom, stamp = self._vm.config, None, None, ""
        is_firmware = False
        initrd: list[int] = []
        disks: dict[int, FoundFile] = {}
        for (use, place), file in zip(self._places, found, strict=True):
            fd = fds[file.chain[0]]
            match use:
                case FileUse.BOOT | FileUse.FIRMWARE:
                    kernel, stamp, is_firmware = fd, file.stamp, use is FileUse.FIRMWARE
                case FileUse.INITRD:
                    initrd.append(fd)
                case FileUse.CDROM:
                    cdrom = fd
                case _:
                    disks[place] = file
        passed = self._passed
        is_named = passed.kernel is None
        return Passed(
            uid=self.uid,
            kernel=kernel,
            path=(config.boot or config.firmware or "") if is_named else passed.path,
            is_firmware=is_firmware,
            initrd=tuple(initrd),
            append=config.append if is_named else passed.append,
            cdrom=cdrom,
            disks=tuple(
                tuple(fds[at] for at in disks[index].chain) if index in disks else ()
                for index in range(len(config.disks))
            ),
            is_judged=True,
            formats=tuple(
                disks[index].formats if index in disks else () for index in range(len(config.disks))
            ),
            shares=passed.shares,
            stamp=stamp,
            stream=passed.stream,
            replies=passed.replies,
            manifest=passed.manifest,
            stays_paused=passed.stays_paused,
            is_snapshot=passed.is_snapshot,
            is_copy=passed.is_copy,
            clock=passed.clock,
        )


def open_client_files(
    vm: Vm, openers: Openers, done: Callable[[OpeningError | None], None]
) -> None:
    """Open and check a client's files of a VM, then call `done`; at once if there are none."""
    try:
        files = ClientFiles(vm, openers.users)
    except OpeningError as err:
        done(err)
        return
    if not files.wanted:
        done(None)
        return

    def then(found: list[FoundFile], fds: list[int]) -> None:
        if vm.passed:
            kept = {vm.passed.stream, vm.passed.replies, *vm.passed.shares}
            Fds([fd for fd in vm.passed.fds if fd not in kept]).close()
        vm.passed = files.judged(found, fds)
        done(None)

    openers.open(files.uid, files.wanted, files.fds, then, done)


def wanted_disk(option: DiskOption, *, locks: bool = True) -> WantedFile:
    """Return which file a disk of the configuration needs, by name."""
    if option.kind is DiskKind.PMEM:
        writes = writes_image(option)
        return WantedFile(use=FileUse.MEMORY, path=option.path, writes=writes, locks=locks)
    return WantedFile(
        use=FileUse.DISK,
        path=option.path,
        writes=writes_image(option),
        format=option.kind,
        locks=locks,
    )
