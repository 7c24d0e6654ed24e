"""What a VM needs of the host, opened by the parent with the rights of whom it is for.

See `files` for how a file is opened. The VM's processes get descriptors, never paths.

Source: sections 2.5, 7.5 and 9.3 of OpenBSD's behaviour.
"""

import errno
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import MEMORY_DEFAULT, Right
from vmd.parent.errors import ResourceError
from vmd.parent.files import FileError, FileKindError, open_file
from vmd.parent.interfaces import Network, open_vhosts
from vmd.rules.policy import Users
from vmd.rules.vm import Vm
from vmd.shared.kernels import KernelStore
from vmd.shared.pty import Pty
from vmd.wire.internal import DiskSpec, NicSpec, VmSpec
from vmd.wire.messages import ErrorCode
from vmm_kvm.block.image import Format
from vmm_kvm.block.locks import lock
from vmm_kvm.boot.firmware import BIOS, find_firmware
from vmm_kvm.boot.nvram import open_copy
from vmm_kvm.errors import BootError, ImageError
from vmm_kvm.images.opening import image_chain

_SERVER_TIMEOUT_S = 1.0


class Resources(NamedTuple):
    """A VM's specification, and the descriptors that it names; whoever holds them owns them."""

    spec: VmSpec
    fds: list[int]


class Host(NamedTuple):
    """What this host has for all VMs."""

    users: Users
    kernels: KernelStore
    state: str | None
    """Directory of what VMs keep; None if there is none."""


def open_resources(vm: Vm, host: Host, pty: Pty, networks: Sequence[Network] = ()) -> Resources:
    """Open all that a VM's processes need; `pty` and `networks` stay the caller's.

    Raises:
        ResourceError: a file is missing, in use, not for this user, or of a wrong kind.
        OSError: the host has no descriptors left.
    """
    if vm.config.is_sev:
        text = "its memory cannot be encrypted: this vmd does not support AMD SEV"
        raise ResourceError(ErrorCode.EINVAL, text)
    with ExitStack() as stack:
        opener = _Opener(vm, host, stack)
        boot, boot_path, variables, initrd, append = opener.boot()
        known = host.kernels.find(opener.fds[boot])
        kernel = None if known is None else opener.keep(known)
        # In OpenBSD's order, which shows in what is complained of first.
        cdrom = opener.cdrom()
        disks = tuple(opener.disk(option) for option in vm.config.disks)
        tty, ring = (opener.keep(os.dup(fd)) for fd in pty[1:])
        spec = VmSpec(
            id=vm.id,
            name=vm.name,
            memory=vm.config.memory or MEMORY_DEFAULT,
            cpus=vm.config.cpus or 1,
            boot=boot,
            boot_path=boot_path,
            is_firmware=vm.boot is None and vm.config.boot is None,
            kernel=kernel,
            variables=variables,
            initrd=initrd,
            append=append,
            disks=disks,
            cdrom=cdrom,
            interfaces=tuple(opener.interface(network) for network in networks),
            tty=tty,
            ring=ring,
            boot_device=vm.config.boot_device,
        )
        stack.pop_all()
    return Resources(spec, opener.fds)


class _Opener:
    """Collects descriptors; `stack` closes them until somebody takes over."""

    def __init__(self, vm: Vm, host: Host, stack: ExitStack) -> None:
        self._vm = vm
        self._users = host.users
        self._state = host.state
        self._stack = stack
        self.fds: list[int] = []

    def keep(self, fd: int) -> int:
        """Take ownership of a descriptor; returns its index."""
        self._stack.callback(os.close, fd)
        self.fds.append(fd)
        return len(self.fds) - 1

    def boot(self) -> tuple[int, str, int | None, tuple[int, ...], str | None]:
        """Open what to boot: what a client passed, a kernel, or firmware.

        Returns the index and path of the image, the index of its variables, those of RAM disks, and
        a command line.
        """
        config, passed = self._vm.config, self._vm.boot
        if passed is not None:
            image = self.keep(os.dup(passed.kernel))
            initrd = tuple(self.keep(os.dup(fd)) for fd in passed.initrd)
            return image, passed.path, None, initrd, passed.append
        initrd = tuple(
            self._open(path, Right.BOOT, ErrorCode.EINVAL, "initrd") for path in config.initrd
        )
        if config.boot is not None:
            image = self._open(config.boot, Right.BOOT, ErrorCode.ENOENT, "boot image")
            return image, config.boot, None, initrd, config.append
        try:
            firmware = find_firmware(config.firmware or BIOS)
        except BootError as err:
            raise ResourceError(ErrorCode.BIOS_MISSING, str(err)) from err
        image = self._open(firmware.code, Right.BOOT, ErrorCode.BIOS_MISSING, "firmware")
        variables = None
        if firmware.variables is not None:
            template = self._open(
                firmware.variables, Right.BOOT, ErrorCode.BIOS_MISSING, "firmware"
            )
            variables = self._variables(template)
        return image, firmware.code, variables, initrd, config.append

    def cdrom(self) -> int | None:
        """Open the ISO image, if there is one."""
        path = self._vm.config.cdrom
        if path is None:
            return None
        return self._open(path, Right.CDROM, ErrorCode.CDROM_MISSING, "cdrom")

    def interface(self, network: Network) -> NicSpec:
        """Take a network interface that there is, and open vhost-net for it if it may be used."""
        taps = tuple(self.keep(os.dup(fd)) for fd in network.queues)
        vhosts = open_vhosts(len(taps)) if network.may_vhost else []
        return NicSpec(
            name=network.tap.name or network.spec.alias,
            lladdr=network.spec.lladdr,
            taps=taps,
            vhosts=tuple(map(self.keep, vhosts)),
            stream=None if network.stream is None else self.keep(os.dup(network.stream)),
            mtu=network.spec.mtu,
            is_locked=network.spec.is_locked,
            is_up=network.has_link,
        )

    def disk(self, option: DiskOption) -> DiskSpec:
        """Open a disk's image, locked, and its bases, read-only; or connect to its server."""
        match option.kind:
            case DiskKind.VHOST_USER:
                return DiskSpec(option=option, chain=(self._connect(option.path),))
            case DiskKind.PMEM:
                return DiskSpec(option=option, chain=(self._memory(option),))
            case DiskKind.PROBE:
                disk_format = None
            case DiskKind.RAW | DiskKind.QCOW2:
                disk_format = Format(option.kind)
        writes = not option.is_read_only
        code = ErrorCode.DISK_MISSING
        chain: list[int] = []

        def open_layer(path: str) -> int:
            if chain:
                chain.append(self._open(path, Right.DISK, code, "base image"))
                return self.fds[chain[-1]]
            chain.append(self._open(path, Right.DISK, code, "disk", writes=writes))
            lock(self.fds[chain[0]], path, writes=writes)
            return self.fds[chain[0]]

        try:
            layers = image_chain(option.path, disk_format, open_layer)
        except ImageError as err:
            raise ResourceError(code, str(err)) from err
        formats = tuple(DiskKind(layer.disk_format or Format.RAW) for layer in layers)
        return DiskSpec(option=option, chain=tuple(chain), formats=formats)

    def _memory(self, option: DiskOption) -> int:
        """Open and lock the image of a disk that is memory; returns its index."""
        writes, code = not option.is_private, ErrorCode.DISK_MISSING
        index = self._open(option.path, Right.DISK, code, "disk", writes=writes)
        try:
            lock(self.fds[index], option.path, writes=writes)
        except ImageError as err:
            raise ResourceError(code, str(err)) from err
        return index

    def _variables(self, template: int) -> int:
        """Open the file that keeps the VM's UEFI variables; returns its index.

        It begins as a copy of the firmware's template, whose index is given.
        """
        if self._state is None:
            raise ResourceError(ErrorCode.EIO, "no directory for UEFI variables: HOME is not set")
        path = f"{self._state}/{self._vm.name}-{self._vm.config.owner.uid or 0}.nvram"
        if not os.path.lexists(path):
            self._vm.new_file = path
        try:
            index = self.keep(open_copy(path, self.fds[template]))
            lock(self.fds[index], path, writes=True)
        except OSError as err:
            raise ResourceError(ErrorCode.EIO, f"UEFI variables {path}: {err.strerror}") from err
        except (ImageError, BootError) as err:
            raise ResourceError(ErrorCode.EIO, f"UEFI variables: {err}") from err
        return index

    def _open(
        self, path: str, right: Right, code: ErrorCode, what: str, *, writes: bool = False
    ) -> int:
        """Open a file, for the requester if the VM claims `right`; returns its index."""
        is_checked = right in self._vm.checked
        requester = self._vm.requester
        user = requester if is_checked and requester not in self._users.administrators else None
        allows_devices = right is Right.DISK and not is_checked
        try:
            fd = open_file(path, user, writes=writes, allows_devices=allows_devices)
        except FileError as err:
            if right is Right.CDROM and isinstance(err, FileKindError):
                code = ErrorCode.CDROM_INVALID
            elif err.errno in {errno.EACCES, errno.EPERM}:
                code = ErrorCode.EPERM
            raise ResourceError(code, f"{what} {path}: {err}") from err
        return self.keep(fd)

    def _connect(self, path: str) -> int:
        if Right.DISK in self._vm.checked and self._vm.requester not in self._users.administrators:
            raise ResourceError(ErrorCode.EPERM, f"vhost-user:{path}: permission denied")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_SERVER_TIMEOUT_S)
        try:
            connection.connect(path)
        except OSError as err:
            connection.close()
            text = f"vhost-user:{path}: {err.strerror or err}"
            raise ResourceError(ErrorCode.DISK_MISSING, text) from err
        connection.setblocking(True)
        return self.keep(connection.detach())
