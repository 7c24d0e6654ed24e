"""A VM's resources on the host: the files that the configuration names, and all others.

A client's files are open already, see `passed`. The VM's processes get descriptors, never paths.

Source: sections 2.5 and 7.5 of OpenBSD's behaviour.
"""

import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from msgspec.structs import replace

from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import MEMORY_DEFAULT, GuestClock
from vmd.config.shares import ShareOption
from vmd.parent.captures import open_again
from vmd.parent.cgroups import Cgroups
from vmd.parent.encryption import open_sev
from vmd.parent.errors import ResourceError
from vmd.parent.interfaces import Interface, open_vhosts
from vmd.parent.passed import wanted_disk
from vmd.parent.scratches import Scratches
from vmd.parent.seeds import make_seed, seed_path
from vmd.parent.shares import Shares
from vmd.parent.tpms import Tpms
from vmd.rules.policy import Users
from vmd.rules.vm import Vm
from vmd.shared.kernels import KernelStore
from vmd.shared.opening import Files, OpeningError
from vmd.shared.pty import Pty
from vmd.wire.channel import Fds
from vmd.wire.files import FileUse, FoundFile, WantedFile
from vmd.wire.internal import DiskSpec, NicSpec, ShareSpec, VmSpec
from vmd.wire.messages import ErrorCode
from vmd.wire.transfers import ReceivedSpec
from vmm_kvm.block.locks import lock
from vmm_kvm.boot.firmware import BIOS, Firmware, find_firmware
from vmm_kvm.boot.nvram import open_copy
from vmm_kvm.boot.source import Stamp
from vmm_kvm.errors import BootError, ImageError

VARIABLES_PER_USER = 64
"""Files of UEFI variables, some 540 KiB each, that are kept for the VMs of an ordinary user."""
_SERVER_TIMEOUT_S = 1.0


class Resources(NamedTuple):
    """A VM's specification, and the descriptors that it names; the holder owns them."""

    spec: VmSpec
    fds: list[int]
    stamp: Stamp
    """Of the boot image; empty if a change might not show in it."""


class Host(NamedTuple):
    """This host's resources for all VMs."""

    users: Users
    kernels: KernelStore
    state: str | None
    """Directory of what VMs keep; None if there is none."""
    scratches: Scratches
    shares: Shares
    tpms: Tpms
    cgroups: Cgroups | None = None
    """None if there are no control groups."""


def open_resources(vm: Vm, host: Host, pty: Pty, interfaces: Sequence[Interface] = ()) -> Resources:
    """Open all that a VM's processes need; `pty` and `interfaces` stay the caller's.

    Raises:
        ResourceError: a file is missing, in use, not for this user, or of a wrong kind.
        OSError: the host has no descriptors left.
    """
    with ExitStack() as stack:
        opener = _Opener(vm, host, stack)
        sev = opener.keep(open_sev(vm)) if vm.config.is_sev else None
        boot, boot_path, variables, initrd, append, stamp = opener.boot()
        known = host.kernels.find(Stamp(stamp))
        kernel = None if known is None else opener.keep(known)
        # In OpenBSD's order, which decides the first complaint.
        cdrom = opener.cdrom()
        disks = tuple(opener.disk(*each) for each in enumerate(vm.config.disks))
        cgroup, device_cgroup, cgroup_number = opener.cgroup(host.cgroups)
        shares = tuple(
            opener.share(place, share, device_cgroup)
            for place, share in enumerate(vm.config.shares)
        )
        tpm = opener.tpm(host.tpms, device_cgroup)
        tty, ring = (opener.keep(os.dup(fd)) for fd in pty[1:])
        spec = VmSpec(
            id=vm.id,
            name=vm.name,
            memory=vm.config.memory or MEMORY_DEFAULT,
            cpus=vm.config.cpus or 1,
            boot=boot,
            boot_path=boot_path,
            is_firmware=_is_firmware(vm),
            kernel=kernel,
            variables=variables,
            initrd=initrd,
            append=append,
            disks=disks,
            cdrom=cdrom,
            cdrom_path=vm.config.cdrom or "",
            interfaces=tuple(opener.interface(one) for one in interfaces),
            shares=shares,
            tty=tty,
            ring=ring,
            cgroup=cgroup,
            device_cgroup=device_cgroup,
            cgroup_number=cgroup_number,
            boot_device=vm.config.boot_device,
            has_vsock=vm.config.has_vsock,
            has_balloon=vm.config.has_balloon,
            has_watchdog=vm.config.has_watchdog,
            tpm=tpm,
            received=opener.received(),
            is_template=vm.state.is_template,
            sev=sev,
            is_sev_es=vm.config.is_sev_es,
            has_timed_out=vm.has_timed_out,
        )
        stack.pop_all()
    return Resources(spec, opener.fds, Stamp(stamp))


def _is_firmware(vm: Vm) -> bool:
    """Tell whether a VM boots firmware, not a kernel."""
    if vm.files is not None and vm.files.kernel is not None:
        return vm.files.is_firmware
    return vm.config.boot is None


class _Opener:
    """Collects descriptors; `stack` closes them unless they are handed over."""

    def __init__(self, vm: Vm, host: Host, stack: ExitStack) -> None:
        self._vm = vm
        self._state = host.state
        self._users = host.users
        self._scratches = host.scratches
        self._shares = host.shares
        self._stack = stack
        self.fds: list[int] = []

    def keep(self, fd: int) -> int:
        """Take ownership of a descriptor; returns its index."""
        self._stack.callback(os.close, fd)
        self.fds.append(fd)
        return len(self.fds) - 1

    def received(self) -> ReceivedSpec | None:
        """Take the stream of a VM that is received."""
        origin, passed = self._vm.origin, self._vm.files
        if origin is not None:
            return ReceivedSpec(
                stream=self.keep(open_again(origin.state)),
                manifest="",
                stays_paused=False,
                memory=self.keep(open_again(origin.memory)),
                is_copy=True,
                clock=GuestClock.FROZEN,
            )
        if passed is None or passed.stream is None:
            return None
        return ReceivedSpec(
            stream=self.keep(os.dup(passed.stream)),
            manifest=passed.manifest,
            stays_paused=passed.stays_paused,
            is_snapshot=passed.is_snapshot,
            is_copy=passed.is_copy,
            clock=passed.clock,
            replies=None if passed.replies is None else self.keep(os.dup(passed.replies)),
        )

    def boot(self) -> tuple[int | None, str, int | None, tuple[int, ...], str | None, str]:
        """Open the boot image: a client's, a kernel, or firmware; none for a received VM.

        Returns the index and path of the image, the index of its variables, those of RAM disks, a
        command line, and the image's stamp.
        """
        config, passed = self._vm.config, self._vm.files
        if self._vm.origin or (passed is not None and passed.stream is not None):
            variables, path = None, passed.path if passed else config.boot or self._vm.name
            if config.boot is None and (passed is None or passed.kernel is None):
                variables = self._variables_of(self._firmware(config.firmware or BIOS).code)
            elif passed is not None and passed.kernel is not None and passed.is_firmware:
                variables = self._variables_of(passed.path)
            return None, path, variables, (), config.append, ""
        if passed is not None and passed.kernel is not None:
            image = self.keep(os.dup(passed.kernel))
            initrd = tuple(self.keep(os.dup(fd)) for fd in passed.initrd)
            variables = self._variables_of(passed.path) if passed.is_firmware else None
            return image, passed.path, variables, initrd, passed.append, passed.stamp
        initrd = tuple(self._open(FileUse.INITRD, path)[0] for path in config.initrd)
        if config.boot is not None:
            image, stamp = self._open(FileUse.BOOT, config.boot)
            return image, config.boot, None, initrd, config.append, stamp
        firmware = self._firmware(config.firmware or BIOS)
        image, stamp = self._open(FileUse.FIRMWARE, firmware.code)
        return image, firmware.code, self._variables_of(firmware.code), initrd, config.append, stamp

    @staticmethod
    def _firmware(wanted: str) -> Firmware:
        try:
            return find_firmware(wanted)
        except BootError as err:
            raise ResourceError(ErrorCode.BIOS_MISSING, str(err)) from err

    def _variables_of(self, code: str) -> int | None:
        """Open the file for this firmware's variables, if it has any; returns its index."""
        template = self._firmware(code).variables
        if template is None:
            return None
        return self._variables(self._open(FileUse.FIRMWARE, template)[0])

    def cdrom(self) -> int | None:
        """Open the ISO image, if there is one."""
        passed, path = self._vm.files, self._vm.config.cdrom
        if passed is not None and passed.cdrom is not None:
            return self.keep(os.dup(passed.cdrom))
        return None if path is None else self._open(FileUse.CDROM, path)[0]

    def cgroup(self, cgroups: Cgroups | None) -> tuple[int | None, int | None, int]:
        """Give the VM control groups; returns descriptors for joining them, and their number.

        No VM starts without the limits that its configuration sets.
        """
        limit = self._vm.config.cpu_limit
        if limit is not None and (cgroups is None or "cpu" not in cgroups.controllers):
            text = "limit cpu: this host gives vmd no cgroup that limits processors, see vmd(8)"
            raise ResourceError(ErrorCode.EINVAL, text)
        if cgroups is None:
            return None, None, 0
        made = cgroups.open(self._vm.id, self._vm.config.memory or MEMORY_DEFAULT, limit)
        return self.keep(made.guest), self.keep(made.devices), made.number

    def tpm(self, tpms: Tpms, device_cgroup: int | None) -> tuple[int, ...]:
        """Start the VM's TPM, if it has one; returns the indices of its channels."""
        if not self._vm.config.has_tpm:
            return ()
        if self._vm.state.is_template:
            text = "a template has no TPM: its clones could not have the secrets"
            raise ResourceError(ErrorCode.EINVAL, text)
        cgroup = None if device_cgroup is None else self.fds[device_cgroup]
        return tuple(map(self.keep, tpms.open(self._vm, cgroup)))

    def interface(self, interface: Interface) -> NicSpec:
        """Take an existing interface, and open vhost-net for it if it may be used."""
        taps = tuple(self.keep(os.dup(fd)) for fd in interface.queues)
        vhosts = open_vhosts(len(taps)) if interface.may_vhost else []
        return NicSpec(
            name=interface.tap.name or interface.spec.alias,
            config=interface.spec.config,
            taps=taps,
            vhosts=tuple(map(self.keep, vhosts)),
            stream=None if interface.stream is None else self.keep(os.dup(interface.stream)),
            is_up=interface.has_link,
        )

    def disk(self, place: int, option: DiskOption) -> DiskSpec:
        """Open a disk's image, locked, and its bases, read-only; or connect to its server.

        For a received VM, the process that uses the image locks it.
        """
        if option.kind is DiskKind.VHOST_USER:
            server = self._connect(option.path, ErrorCode.DISK_MISSING)
            return DiskSpec(option=option, chain=(server,))
        passed = self._vm.files
        self._seed(option)
        locks = passed is None or not passed.has_sender
        if passed is not None and place < len(passed.disks) and passed.disks[place]:
            chain = tuple(self.keep(os.dup(fd)) for fd in passed.disks[place])
            formats = passed.formats[place]
        else:
            found = self._find(wanted_disk(option, locks=locks))
            chain, formats = found.chain, found.formats
        scratch = None
        if option.is_snapshot and not option.is_read_only:
            fd = self._scratches.open(self._vm.id, place, self._vm.config.owner)
            scratch = self.keep(os.dup(fd))
        return DiskSpec(
            option=option, chain=chain, formats=formats, scratch=scratch, is_locked=locks
        )

    def _seed(self, option: DiskOption) -> None:
        """Make the seed, if this disk is one, for a guest that boots or if there is none."""
        vm, passed = self._vm, self._vm.files
        if vm.config.seed is None or option.path != seed_path(self._state, vm.name):
            return
        goes_on = vm.origin is not None or (passed is not None and passed.stream is not None)
        if not (goes_on and os.path.lexists(option.path)):
            make_seed(self._state, vm.name, vm.config.seed)

    def share(self, place: int, option: ShareOption, cgroup: int | None) -> ShareSpec:
        """Have a shared directory served, with its client's rights or the VM's owner's.

        `cgroup` is the index of the control group of device processes.
        """
        if option.is_server:
            server = self._connect(option.path, ErrorCode.ENOENT)
            return ShareSpec(tag=option.tag, socket=server)
        vm, passed = self._vm, self._vm.files
        directory, uid = None, vm.config.owner.uid or 0
        if passed is not None and place < len(passed.shares):
            directory, uid = passed.shares[place], passed.uid
        connection, status = self._shares.start(
            *(vm.id, vm.name, option, uid),
            directory=directory,
            cgroup=None if cgroup is None else self.fds[cgroup],
        )
        return ShareSpec(tag=option.tag, socket=self.keep(connection), status=self.keep(status))

    def _variables(self, template: int) -> int:
        """Open the file that keeps the VM's UEFI variables; returns its index.

        It begins as a copy of the firmware's template, whose index is given.
        """
        if self._state is None:
            raise ResourceError(ErrorCode.EIO, "no directory for UEFI variables: HOME is not set")
        ending = f"-{self._vm.config.owner.uid or 0}.nvram"
        path = f"{self._state}/{self._vm.name}{ending}"
        if not os.path.lexists(path):
            self._check_room(ending)
            self._vm.new_file = path
        try:
            index = self.keep(open_copy(path, self.fds[template]))
            lock(self.fds[index], path, writes=True)
        except OSError as err:
            raise ResourceError(ErrorCode.EIO, f"UEFI variables {path}: {err.strerror}") from err
        except (ImageError, BootError) as err:
            raise ResourceError(ErrorCode.EIO, f"UEFI variables: {err}") from err
        return index

    def _check_room(self, ending: str) -> None:
        """Raise ResourceError if an ordinary user has the maximum number of files of variables.

        They outlive the VMs, which come back under their names; `ending` is that of their names.
        """
        if self._vm.requester in self._users.administrators:
            return
        try:
            kept = sum(name.endswith(ending) for name in os.listdir(self._state))  # noqa: PTH208 - names alone
        except FileNotFoundError:  # this is the first
            return
        except OSError as err:
            text = f"UEFI variables {self._state}: {err.strerror}"
            raise ResourceError(ErrorCode.EIO, text) from err
        if kept >= VARIABLES_PER_USER:
            text = f"limit of {VARIABLES_PER_USER} VMs of one user whose UEFI variables are kept"
            raise ResourceError(ErrorCode.EPERM, text)

    def _open(self, use: FileUse, path: str) -> tuple[int, str]:
        """Open a file of the configuration's; returns its index and its stamp."""
        found = self._find(WantedFile(use=use, path=path))
        return found.chain[0], found.stamp

    def _find(self, wanted: WantedFile) -> FoundFile:
        """Open a file of the configuration, and the files that it refers to, by name."""
        with Files() as files:
            try:
                files.open([wanted], Fds())
            except OpeningError as err:
                raise ResourceError(err.code, str(err)) from err
            (found,) = files.found
            indices = [self.keep(fd) for fd in files.take()]
        return replace(found, chain=tuple(indices[at] for at in found.chain))

    def _connect(self, path: str, code: ErrorCode) -> int:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_SERVER_TIMEOUT_S)
        try:
            connection.connect(path)
        except OSError as err:
            connection.close()
            text = f"vhost-user:{path}: {err.strerror or err}"
            raise ResourceError(code, text) from err
        connection.setblocking(True)
        return self.keep(connection.detach())
