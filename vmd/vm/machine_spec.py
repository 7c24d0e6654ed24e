"""The machine of a VM process, made of the parent's descriptors."""

import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from vmd.config.disks import DiskKind
from vmd.shared.kernels import LentKernel
from vmd.shared.late_locks import LOCK_PATIENCE_S, lock_when_free
from vmd.shared.vm_devices import Connections, DeviceConnection
from vmd.vm.receiving import Arrived
from vmd.wire.channel import Fds
from vmd.wire.internal import DiskSpec, NicSpec, ShareSpec, VmSpec
from vmm_kvm.arch.x86.image import BootImage, RestoredImage, probe_image, read_firmware
from vmm_kvm.block.image import Format
from vmm_kvm.block.mapped import MappedImage
from vmm_kvm.boot.nvram import Variables
from vmm_kvm.boot.source import FileSource
from vmm_kvm.errors import ImageError, SpecError
from vmm_kvm.images.opening import open_disc, open_image
from vmm_kvm.machine.net import NetSpec
from vmm_kvm.machine.spec import BASIC_DEVICES, MachineSpec
from vmm_kvm.net.ethernet import parse_lladdr
from vmm_kvm.net.paths import Path, RemotePath, StreamPath, Traffic, VhostPath
from vmm_kvm.pci.i6300esb import WatchdogSpec
from vmm_kvm.swtpm import Swtpm
from vmm_kvm.virtio.balloon import BalloonSpec
from vmm_kvm.virtio.pmem import PmemSpec
from vmm_kvm.virtio.scsi import ScsiCdSpec
from vmm_kvm.virtio.vhost_user.blk import RemoteBlkSpec
from vmm_kvm.virtio.vhost_user.fs import RemoteFsSpec
from vmm_kvm.virtio.vhost_user.readiness import await_ready
from vmm_kvm.virtio.vsock import VsockSpec

if TYPE_CHECKING:  # loaded for the VMs that have it
    from vmm_kvm.kvm.sev import SevSpec


def has_servers(spec: VmSpec) -> bool:
    """Tell whether another process serves a device of a VM, as `spec.has_servers` will."""
    return (
        any(disk.option.kind is not DiskKind.PMEM for disk in spec.disks)
        or any(nic.has_process for nic in spec.interfaces)
        or bool(spec.shares)
    )


def _image(spec: VmSpec, fds: Fds, received: Arrived | None) -> BootImage:
    if spec.boot is not None:
        read = read_firmware if spec.is_firmware else probe_image
        return read(FileSource(fds.take(spec.boot), spec.boot_path))
    return (received and received.image) or RestoredImage(spec.boot_path)


def machine_spec_of(
    spec: VmSpec,
    fds: Fds,
    connections: Connections,
    stack: ExitStack,
    *,
    received: Arrived | None,
    lend: Callable[[int], None],
) -> MachineSpec:
    """Return the machine of a VM, made of open descriptors; `stack` closes what is opened of them.

    Args:
        spec: the VM's specification.
        fds: the descriptors that it names.
        connections: to its device processes.
        stack: of the caller's.
        received: the state from which it continues, if it does not boot.
        lend: is handed an unpacked kernel, which it owns.

    Raises:
        VmmError, OSError: a descriptor or file is unsuitable.
    """
    kernel = None if spec.kernel is None else FileSource(fds.take(spec.kernel), spec.boot_path)
    image = _image(spec, fds, received)
    variables = None
    if spec.variables is not None:
        file = open_image(fds.take(spec.variables), Format.RAW, read_only=False, name="nvram")
        variables = stack.enter_context(Variables.of(file))
    cdroms = []
    if spec.cdrom is not None:
        cdrom = open_disc(fds.take(spec.cdrom), name="cdrom")
        stack.callback(cdrom.close)
        cdroms.append(ScsiCdSpec(cdrom))
    disks = tuple(
        _disk(disk, fds, connection, stack)
        for connection, disk in zip(connections.disks, spec.disks, strict=True)
    )
    nets = tuple(
        NetSpec(
            parse_lladdr(nic.lladdr),
            _path(nic, fds, connection),
            nic.name,
            nic.mtu,
            nic.config.is_locked,
            nic.is_up,
        )
        for connection, nic in zip(connections.nics, spec.interfaces, strict=True)
    )
    return MachineSpec(
        image=image,
        kernels=LentKernel(kernel, lend),
        variables=variables,
        memory_size=spec.memory,
        cpus=spec.cpus,
        devices=(
            *(*BASIC_DEVICES, *nets, *disks, *cdroms),
            *(_share(share, fds) for share in spec.shares),
            *(*_vsock(spec, received), *_own(spec)),
        ),
        boot_device=spec.boot_device,
        name=spec.name,
        command_line=spec.append,
        initrd=tuple(FileSource(fds.take(at), "initrd") for at in spec.initrd),
        uuid=received.manifest.uuid if received else None,
        serial=received.manifest.serial if received else "",
        shares_memory=spec.is_template,
        sev=_sev(spec, fds, stack),
        tpm=_tpm(spec, fds, stack),
    )


def _vsock(spec: VmSpec, received: Arrived | None) -> tuple[VsockSpec, ...]:
    """Return the vsock device, if there is one: nothing of the host listens to the guest."""
    if not spec.has_vsock:
        return ()
    cid = received.manifest.vsock_cid if received else None
    return (VsockSpec() if cid is None else VsockSpec(cid),)


def _sev(spec: VmSpec, fds: Fds, stack: ExitStack) -> "SevSpec | None":
    if spec.sev is None:
        return None
    from vmm_kvm.kvm.sev import SevSpec  # noqa: PLC0415 - few VMs have it

    fd = fds.take(spec.sev)
    stack.callback(os.close, fd)
    return SevSpec(fd, spec.is_sev_es)


def _own(spec: VmSpec) -> Iterator[BalloonSpec | WatchdogSpec]:
    if spec.has_balloon:
        yield BalloonSpec()
    if spec.has_watchdog:
        yield WatchdogSpec(has_timed_out=spec.has_timed_out)


def _tpm(spec: VmSpec, fds: Fds, stack: ExitStack) -> Swtpm | None:
    if not spec.tpm:
        return None
    control, data = (socket.socket(fileno=fds.take(at)) for at in spec.tpm)
    return stack.enter_context(Swtpm(control, data))


def _disk(
    disk: DiskSpec, fds: Fds, connection: DeviceConnection | None, stack: ExitStack
) -> RemoteBlkSpec | PmemSpec:
    """Return a disk's server: a process of ours, a foreign one, or this one's memory."""
    path = disk.option.path
    if connection is not None:
        connected = _Connection(
            connection.socket, connection.status, path, is_locked=disk.is_locked
        )
        return RemoteBlkSpec(connected.connect, path, may_halt=True)
    fd = fds.take(disk.chain[0])
    if disk.option.kind is DiskKind.PMEM:
        if not disk.is_locked:
            lock_when_free(fd, path, writes=not disk.option.is_private)
        image = MappedImage(path, is_private=disk.option.is_private, fd=fd)
        return PmemSpec(stack.enter_context(image), path)
    return RemoteBlkSpec(lambda: socket.socket(fileno=fd), path)


def _share(share: ShareSpec, fds: Fds) -> RemoteFsSpec:
    """Return a shared directory's server: a process of ours, or a foreign one."""
    name, sock = f"share {share.tag}", fds.take(share.socket)
    if share.status is None:
        return RemoteFsSpec(lambda: socket.socket(fileno=sock), os.fsencode(share.tag), name)
    connected = _Connection(sock, fds.take(share.status), name)
    return RemoteFsSpec(connected.connect, os.fsencode(share.tag), name)


def _path(nic: NicSpec, fds: Fds, connection: DeviceConnection | None) -> Path:
    """Return an interface's data path; the process owns the descriptors to its end."""
    if connection is not None:
        connected = _Connection(connection.socket, connection.status, nic.name)
        return RemotePath(connected.connect, is_ours=True)
    taps = tuple(fds.take(at) for at in nic.taps)
    if nic.vhosts:
        return VhostPath(taps, tuple(fds.take(at) for at in nic.vhosts))
    if nic.stream is None:
        raise SpecError(f"{nic.name}: an interface without tap and stream")
    return StreamPath(fds.take(nic.stream), Traffic())


class _Connection:
    """A device process's connection, for the one machine that this process makes."""

    def __init__(self, sock: int, status: int, path: str, *, is_locked: bool = True) -> None:
        self._socket, self._status = sock, status
        self._path = path
        self._is_locked = is_locked

    def connect(self) -> socket.socket:
        """Wait until the device process is ready.

        Raises:
            ImageError: it cannot open what it serves; the text is its own. Or it waits for a disk
                that does not come free.
        """
        poll = select.poll()
        poll.register(self._status, select.POLLIN)
        if not self._is_locked and not poll.poll(LOCK_PATIENCE_S * 1000):
            raise ImageError(f"{self._path}: in use by another process")
        reason = await_ready(self._status)
        if reason is not None:
            raise ImageError(reason or f"{self._path}: its process has crashed")
        return socket.socket(fileno=self._socket)
