"""A VM that comes from a stream: first its memory, then a machine around it.

The whole stream is read and verified before the machine is made, because the sender may use a disk
until then. The parent has only the client's account of the manifest; here the manifest is checked
against it.
"""

import mmap
import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple

from vmd.vm.sending import PATIENCE_S
from vmd.wire.internal import VmSpec
from vmm_kvm.arch.x86.bios import FirmwareImage
from vmm_kvm.arch.x86.cpuid import guest_cpuid
from vmm_kvm.bits import PAGE_SIZE, align_up
from vmm_kvm.errors import SnapshotError, VmmError
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.log import Log
from vmm_kvm.machine.state import MachineState
from vmm_kvm.memory import GuestMemory
from vmm_kvm.snapshot import state as states
from vmm_kvm.snapshot.cpu import CpuidRecord, check_cpuid, cpuid_records
from vmm_kvm.snapshot.fds import FdSink, FdSource
from vmm_kvm.snapshot.file import SnapshotFile
from vmm_kvm.snapshot.generations import Generation, take_generations
from vmm_kvm.snapshot.handover import await_go, say_ready
from vmm_kvm.snapshot.manifest import Manifest
from vmm_kvm.snapshot.ram import read_extents
from vmm_kvm.snapshot.state import State
from vmm_kvm.snapshot.stream import StreamReader, parse_head

log = Log(__name__)


class Arrived(NamedTuple):
    """A machine that is complete, except for its devices."""

    manifest: Manifest
    state: MachineState
    memory: GuestMemory
    """The holder's."""
    image: FirmwareImage | None
    """The firmware below 4 GiB, if the guest has any."""
    generations: Mapping[int, Generation]
    """Of the images of disks, by their places."""
    replies: FdSink | None = None
    """The messages to the sender, if it hands the VM over; the holder's."""


def receive(
    fd: int,
    spec: VmSpec,
    kvm: Kvm,
    *,
    is_private: bool,
    ram_fd: int | None = None,
    replies_fd: int | None = None,
) -> Arrived:
    """Read the machine of a VM from its stream or snapshot; takes ownership of `fd`.

    `is_private` is whether no other process needs its memory. With `ram_fd`, which stays the
    caller's, it is a clone's. `replies_fd`, which it takes too, is what a sender hears that hands
    the VM over: this returns when it has let go.

    Raises:
        SnapshotError: it is damaged, or of another VM, or this processor will not do.
        OSError: it cannot be read, or the host has no memory left.
    """
    assert spec.received is not None
    if spec.received.is_snapshot:
        return _load(fd, spec, kvm, is_private=is_private)
    if ram_fd is not None:
        return _continue(fd, ram_fd, spec, is_private=is_private)
    with ExitStack() as stack:
        source = stack.enter_context(FdSource(fd, PATIENCE_S))
        replies = None
        if replies_fd is not None:
            replies = stack.enter_context(FdSink(replies_fd, PATIENCE_S))
        reader = StreamReader(source, spec.received.manifest.encode())
        manifest = reader.manifest
        _check(manifest, spec)
        check_cpuid(manifest.cpuid, own_cpuid(kvm, spec))
        memory = GuestMemory(manifest.regions, spec.name, is_private=is_private)
        try:
            state = states.decode(reader.read_machine(memory))
            image = _image(manifest, state.blobs.get("rom/contents", b""))
            if replies:
                say_ready(replies)
                await_go(source)
        except BaseException:
            memory.close()
            raise
        source.close()
        stack.pop_all()
    return _arrived(manifest, state, memory, image)._replace(replies=replies)


def _arrived(
    manifest: Manifest, state: State, memory: GuestMemory, image: FirmwareImage | None
) -> Arrived:
    try:
        state, generations = take_generations(state, len(manifest.disks))
    except BaseException:
        memory.close()
        raise
    machine = MachineState(dict(state.parts), dict(state.blobs))
    return Arrived(manifest, machine, memory, image, generations)


def _load(fd: int, spec: VmSpec, kvm: Kvm, *, is_private: bool) -> Arrived:
    """Continue from a snapshot, which does not change.

    Memory that no other process needs is mapped: untouched parts are not even read.
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
    return _arrived(manifest, state, memory, image)


def _continue(fd: int, ram_fd: int, spec: VmSpec, *, is_private: bool) -> Arrived:
    """Continue as a clone, from what a VM of this host has left in sealed memory.

    Both come from that VM's process, and nobody has read them yet. What `ram_fd` holds is mapped if
    no other process needs it, else copied.
    """
    try:
        contents = memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
    except ValueError as err:  # so says Python where there is nothing
        raise SnapshotError(f"state: {err}") from err
    finally:
        os.close(fd)
    manifest, told = parse_head(contents)
    _check(manifest, spec)
    if os.fstat(ram_fd).st_size != manifest.memory_size:
        raise SnapshotError("memory: not as large as the manifest says")
    state = states.decode(told)
    image = _image(manifest, state.blobs.get("rom/contents", b""))
    mapped = (ram_fd, 0) if is_private else None
    memory = GuestMemory(manifest.regions, spec.name, is_private=is_private, mapped=mapped)
    if mapped is None:
        try:
            read_extents(ram_fd, memory)
        except BaseException:
            memory.close()
            raise
    return _arrived(manifest, state, memory, image)


def own_cpuid(kvm: Kvm, spec: VmSpec) -> tuple[CpuidRecord, ...]:
    """Return the compared CPUID leaves that this host shows to a VM's guest.

    The guest's own vCPUs may differ, as some bits follow settings of the guest.
    """
    return cpuid_records(guest_cpuid(kvm.supported_cpuid(), 0, spec.cpus))


def _check(manifest: Manifest, spec: VmSpec) -> None:
    """Refuse a VM that differs from the one that the parent expects.

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


def tell_sender(arrived: Arrived, line: bytes) -> None:
    """Tell the outcome to a sender that hands a VM over, and no more."""
    if arrived.replies is None:
        return
    with arrived.replies as replies:
        try:
            replies.write(line)
        except (VmmError, OSError) as err:  # it will say that it does not know
            log.warning("the sender: %s", err)
