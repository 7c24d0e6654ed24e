"""Being a VM that comes from a stream: its memory first, and a machine around it then.

All of the stream is read, and found to be right, before the machine is made, because a disk may be
the sender's until then. What the parent has been told of the manifest was the client's word; here
the manifest is held against it.
"""

from typing import NamedTuple

from vmd.vm.sending import PATIENCE_S
from vmd.wire.internal import VmSpec
from vmm_kvm.arch.x86.bios import FirmwareImage
from vmm_kvm.arch.x86.cpuid import guest_cpuid
from vmm_kvm.bits import PAGE_SIZE, align_up
from vmm_kvm.errors import SnapshotError
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.machine.state import MachineState
from vmm_kvm.memory import GuestMemory
from vmm_kvm.snapshot import state as states
from vmm_kvm.snapshot.cpu import CpuidRecord, check_cpuid, cpuid_records
from vmm_kvm.snapshot.fds import FdSource
from vmm_kvm.snapshot.file import SnapshotFile
from vmm_kvm.snapshot.manifest import Manifest
from vmm_kvm.snapshot.stream import StreamReader


class Arrived(NamedTuple):
    """A machine that is complete, but for its devices."""

    manifest: Manifest
    state: MachineState
    memory: GuestMemory
    """The holder's."""
    image: FirmwareImage | None
    """What is below 4 GiB, if the guest has firmware."""


def receive(fd: int, spec: VmSpec, kvm: Kvm, *, is_private: bool) -> Arrived:
    """Read the machine of a VM from its stream or snapshot; takes ownership of `fd`.

    `is_private` is whether no other process serves a device of it.

    Raises:
        SnapshotError: it is damaged, or of another VM, or this processor will not do.
        OSError: it cannot be read, or the host has no memory left.
    """
    assert spec.received is not None
    if spec.received.is_snapshot:
        return _load(fd, spec, kvm, is_private=is_private)
    with FdSource(fd, PATIENCE_S) as source:
        reader = StreamReader(source, spec.received.manifest.encode())
        manifest = reader.manifest
        _check(manifest, spec)
        check_cpuid(manifest.cpuid, own_cpuid(kvm, spec))
        memory = GuestMemory(manifest.regions, spec.name, is_private=is_private)
        try:
            state = states.decode(reader.read_machine(memory))
            image = _image(manifest, state.blobs.get("rom/contents", b""))
        except BaseException:
            memory.close()
            raise
    return Arrived(manifest, MachineState(dict(state.parts), dict(state.blobs)), memory, image)


def _load(fd: int, spec: VmSpec, kvm: Kvm, *, is_private: bool) -> Arrived:
    """Go on from a snapshot, which stays as it is.

    Memory that no other process needs is mapped: what the guest does not touch is not even read.
    """
    with SnapshotFile(fd) as file:
        manifest = file.manifest
        _check(manifest, spec)
        check_cpuid(manifest.cpuid, own_cpuid(kvm, spec))
        state = states.decode(file.state)
        image = _image(manifest, state.blobs.get("rom/contents", b""))
        mapped = file.mapped if is_private else None
        memory = GuestMemory(manifest.regions, spec.name, is_private=is_private, mapped=mapped)
        if mapped is None:
            try:
                file.read_ram(memory)
            except BaseException:
                memory.close()
                raise
    return Arrived(manifest, MachineState(dict(state.parts), dict(state.blobs)), memory, image)


def own_cpuid(kvm: Kvm, spec: VmSpec) -> tuple[CpuidRecord, ...]:
    """Return what this host's processor shows to the guest of a VM, as far as it is compared.

    It is not what the guest's own vCPUs say, of which some follows what the guest has switched on.
    """
    return cpuid_records(guest_cpuid(kvm.supported_cpuid(), 0, spec.cpus))


def _check(manifest: Manifest, spec: VmSpec) -> None:
    """Refuse a VM that is not the one that the parent has made room for.

    Raises:
        SnapshotError: what differs.
    """
    for what, told, wanted in (
        ("memory", manifest.memory_size, spec.memory),
        ("cpus", manifest.cpus, spec.cpus),
        ("disks", len(manifest.disks), len(spec.disks)),
        ("cdrom", manifest.cdrom is not None, spec.cdrom is not None),
        (
            "interfaces",
            [each.lladdr for each in manifest.interfaces],
            [nic.lladdr for nic in spec.interfaces],
        ),
    ):
        if told != wanted:
            raise SnapshotError(f"manifest: {what}: not as it was asked for")


def _image(manifest: Manifest, rom: bytes) -> FirmwareImage | None:
    """Return the firmware that the guest sees."""
    firmware = manifest.firmware
    if firmware is None:
        return None
    if len(rom) != align_up(firmware.size, PAGE_SIZE):
        raise SnapshotError("manifest: firmware: not the machine's")
    return FirmwareImage(firmware.name, rom, firmware.size)
