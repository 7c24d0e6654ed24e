"""`vmctl run --from`: a VM in the foreground, from a snapshot or a stream that `vmctl send` wrote.

Its disks are those that the snapshot names. They are served in this process, whatever served them
before, so that RAM can be mapped: what the guest does not touch is not even read. Only the daemon
makes network interfaces: a VM that has some is for `vmctl receive`.
"""

import os
import stat
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple

from vmctl.foreground.own_devices import own_devices
from vmm_kvm.arch.x86.cpuid import guest_cpuid
from vmm_kvm.arch.x86.image import FirmwareImage, RestoredImage, open_image
from vmm_kvm.bits import PAGE_SIZE, align_up
from vmm_kvm.boot_device import BootDevice
from vmm_kvm.errors import BootError, SnapshotError, VmmError
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.machine.spec import BASIC_DEVICES, MachineSpec, has_servers
from vmm_kvm.machine.state import MachineState
from vmm_kvm.memory import GuestMemory
from vmm_kvm.snapshot import file as files
from vmm_kvm.snapshot import state as states
from vmm_kvm.snapshot.cpu import check_cpuid, cpuid_records
from vmm_kvm.snapshot.fds import FdSource
from vmm_kvm.snapshot.file import SnapshotFile
from vmm_kvm.snapshot.generations import Generation, check_generations, take_generations
from vmm_kvm.snapshot.stream import StreamReader

if TYPE_CHECKING:  # loaded where there is such a thing
    from collections.abc import Iterator

    from vmctl.foreground.vsock import VsockOption
    from vmm_kvm.arch.x86.image import BootImage
    from vmm_kvm.boot.nvram import Variables
    from vmm_kvm.machine.spec import DeviceSpec
    from vmm_kvm.snapshot.manifest import Disk, Manifest

_PATIENCE_S = 30.0


class Saved(NamedTuple):
    """A saved VM: its specification and its state."""

    spec: MachineSpec
    state: MachineState
    memory: GuestMemory
    """The first machine's."""


def open_saved(
    path: str, name: str, kvm: Kvm, stack: ExitStack, vsock: "VsockOption | None" = None
) -> Saved:
    """Read a VM from the file at `path`, and open its disks; `stack` closes them.

    Its name is `name`, or its former one if that is empty. `vsock` is the path of its vsock device,
    if it has one.

    Raises:
        SnapshotError: the file is damaged, or its VM cannot be here.
        VmmError, OSError: a disk cannot be opened, or the host has no memory left.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as err:
        raise SnapshotError(f"{path}: {err.strerror}") from err
    try:
        return _open(fd, name, kvm, stack, vsock)
    except SnapshotError as err:
        raise SnapshotError(f"{path}: {err}") from err
    except OSError as err:
        if isinstance(err, VmmError):
            raise
        raise SnapshotError(f"{path}: {err.strerror}") from err


def _open(fd: int, name: str, kvm: Kvm, stack: ExitStack, vsock: "VsockOption | None") -> Saved:
    source: SnapshotFile | StreamReader
    is_file = stat.S_ISREG(os.fstat(fd).st_mode)
    if is_file and os.pread(fd, len(files.MAGIC), 0) == files.MAGIC:
        source = stack.enter_context(SnapshotFile(fd))
    else:
        source = StreamReader(stack.enter_context(FdSource(fd, _PATIENCE_S)))
    manifest = source.manifest
    check_cpuid(manifest.cpuid, cpuid_records(guest_cpuid(kvm.supported_cpuid(), 0, manifest.cpus)))
    if any(manifest.kept):
        raise SnapshotError("the VM's disks are in the snapshot: use 'vmctl start --from'")
    if manifest.interfaces:
        raise SnapshotError("the VM has network interfaces: use 'vmctl receive'")
    if vsock and manifest.vsock_cid is None:
        raise SnapshotError("the VM has no vsock device: use no --vsock")
    found = _generations(manifest)
    devices = (*BASIC_DEVICES, *_devices(manifest, stack), *_vsock(manifest, vsock))
    is_private = not has_servers(devices)
    mapped = source.mapped if is_private and isinstance(source, SnapshotFile) else None
    memory = stack.enter_context(
        GuestMemory(manifest.regions, name or manifest.name, is_private=is_private, mapped=mapped)
    )
    if isinstance(source, StreamReader):
        state = states.decode(source.read_machine(memory))
    else:
        state = states.decode(source.state)
        if mapped is None:
            source.read_ram(memory)
    state, wanted = take_generations(state, len(manifest.disks))
    check_generations((disk.path for disk in manifest.disks), wanted, found)
    image = _image(manifest, state.blobs.get("rom/contents", b""))
    spec = MachineSpec(
        image=image,
        variables=_variables(stack) if "flash" in state.parts else None,
        memory_size=manifest.memory_size,
        cpus=manifest.cpus,
        name=name or manifest.name,
        devices=devices,
        command_line=manifest.boot.append,
        initrd=manifest.boot.initrd,
        boot_device=BootDevice(manifest.boot.device),
        uuid=manifest.uuid,
        serial=manifest.serial,
    )
    return Saved(spec, MachineState(dict(state.parts), dict(state.blobs)), memory)


def _generations(manifest: "Manifest") -> dict[int, Generation]:
    """Return those of the images, before they are opened; a missing one is refused then."""
    found = {}
    for place, disk in enumerate(manifest.disks):
        with suppress(OSError):
            fd = os.open(disk.path, os.O_PATH | os.O_CLOEXEC)
            try:
                found[place] = Generation.of(fd)
            finally:
                os.close(fd)
    return found


def _image(manifest: "Manifest", rom: bytes) -> "BootImage":
    """Return the guest's boot image, for reboots, as far as it exists here."""
    firmware, path = manifest.firmware, manifest.boot.image
    if firmware is not None:
        if len(rom) != align_up(firmware.size, PAGE_SIZE):
            raise SnapshotError("manifest: firmware: not the machine's")
        return FirmwareImage(firmware.name, rom, firmware.size)
    if path is not None:
        try:
            return open_image(path)
        except BootError as err:
            return RestoredImage(str(err))
    return RestoredImage(manifest.name)


def _variables(stack: ExitStack) -> "Variables":
    """Return room for UEFI variables, which the state fills."""
    from vmm_kvm.boot.firmware import UEFI, find_firmware  # noqa: PLC0415 - for UEFI guests only
    from vmm_kvm.boot.nvram import open_variables  # noqa: PLC0415 - the same

    template = find_firmware(UEFI).variables
    if template is None:
        raise SnapshotError("this host has no template of UEFI variables")
    return stack.enter_context(open_variables(template, None))


def _devices(manifest: "Manifest", stack: ExitStack) -> "Iterator[DeviceSpec]":
    if manifest.disks or manifest.cdrom is not None:
        from vmctl.foreground.disks import open_cdrom, open_disk  # noqa: PLC0415 - not every VM has a disk

        for index, disk in enumerate(manifest.disks):
            yield open_disk(_disk_text(disk), index, stack)
        if manifest.cdrom is not None:
            yield open_cdrom(manifest.cdrom, stack)
    yield from own_devices(manifest.has_console, manifest.has_balloon, manifest.has_watchdog)


def _vsock(manifest: "Manifest", option: "VsockOption | None") -> "Iterator[DeviceSpec]":
    if manifest.vsock_cid is not None:
        from vmm_kvm.virtio.vsock import VsockSpec  # noqa: PLC0415 - few VMs have one

        yield (
            option._replace(cid=manifest.vsock_cid).spec()
            if option
            else VsockSpec(manifest.vsock_cid)
        )


def _disk_text(disk: "Disk") -> str:
    """Return a disk as `-d` takes it."""
    options = [disk.path.replace(",", ",,")]
    if disk.is_read_only:
        options.append("ro")
    if disk.serial:
        options.append(f"serial={disk.serial.replace(',', ',,')}")
    if disk.queues > 1:
        options.append(f"queues={disk.queues}")
    if disk.is_private:
        options.append("private")
    return f"{disk.kind}:{','.join(options)}" if disk.kind else ",".join(options)
