"""Machines whose memory is encrypted: what they cannot have, and how their launch goes.

What the host has put into memory, it hands to the processor's firmware at the launch; from then on
only the guest can read it. All else the guest shares on purpose, page by page: for its devices, the
driver of each copies what it sends and receives through pages that it shares. So virtio devices
have VIRTIO_F_ACCESS_PLATFORM, without which no driver does that.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from errno import ENODEV
from typing import TYPE_CHECKING

from vmm_kvm.arch.x86.bios import FirmwareImage
from vmm_kvm.arch.x86.cpuid import c_bit
from vmm_kvm.arch.x86.entry import Entry
from vmm_kvm.arch.x86.entry_state import load_entry
from vmm_kvm.arch.x86.reset_block import other_vcpus
from vmm_kvm.bits import align_down, align_up
from vmm_kvm.devices.rom import Rom
from vmm_kvm.errors import KvmError, SpecError
from vmm_kvm.kvm.sev import BLOCK, Launch, Measurement, SevSpec
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import Vcpu
from vmm_kvm.memory import GuestMemory

if TYPE_CHECKING:
    from vmm_kvm.machine.spec import MachineSpec

_IMPOSSIBLE = {
    "pmem": "a disk of format pmem, which is memory that is not encrypted",
    "balloon": "a balloon, since memory that has to stay in its place cannot go back to the host",
}


class RecordedMemory(GuestMemory):
    """Guest memory that knows what was put into it before the guest runs."""

    __slots__ = ("_is_recording", "_touched")

    def __init__(
        self, ranges: Sequence[tuple[int, int]], name: str = "guest", *, is_private: bool = False
    ) -> None:
        """Allocate RAM, see `GuestMemory`, and begin to record."""
        self._touched: list[tuple[int, int]] = []
        self._is_recording = True
        super().__init__(ranges, name, is_private=is_private)

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a view, and note it as long as nothing is encrypted yet."""
        if size and self._is_recording:
            self._touched.append((gpa, size))
        return super().view(gpa, size)

    def read(self, gpa: int, size: int) -> bytes:
        """Copy bytes, which is no reason to note them."""
        return bytes(super().view(gpa, size))

    def take_segments(self) -> Iterator[tuple[int, int]]:
        """Stop recording; yield address and size of what was noted.

        They are whole blocks, ascending; none is there twice.
        """
        self._is_recording = False
        blocks = sorted(
            (align_down(gpa, BLOCK), align_up(gpa + size, BLOCK)) for gpa, size in self._touched
        )
        merged: list[tuple[int, int]] = []
        for start, end in blocks:
            if merged and start <= merged[-1][1]:
                first, last = merged.pop()
                merged.append((first, max(last, end)))
            else:
                merged.append((start, end))
        yield from ((start, end - start) for start, end in merged)


def plan_launch(spec: "MachineSpec", sev: SevSpec, kvm: Kvm, *, is_restored: bool) -> Launch:
    """Return the launch of a machine whose memory is to be encrypted.

    Raises:
        SpecError: the machine has something that does not go together with that.
        KvmError: the processor has no SEV.
    """
    if is_restored:
        raise SpecError(f"{spec.name}: encrypted memory cannot be restored")
    if spec.shares_memory:
        raise SpecError(f"{spec.name}: encrypted memory cannot be cloned")
    for device in spec.devices:
        if device.kind in _IMPOSSIBLE:
            raise SpecError(f"{spec.name}: encrypted memory: not with {_IMPOSSIBLE[device.kind]}")
    if sev.is_es and spec.cpus > 1 and _other_vcpus(spec) is None:
        text = "SEV-ES with several vCPUs: only with UEFI firmware that names where they start"
        raise SpecError(f"{spec.name}: {text}")
    position = c_bit(kvm.supported_cpuid())
    if position is None:
        raise KvmError("SEV", ENODEV, "SEV enabled but no C-bit reported")
    return Launch(kvm, sev, position)


def _other_vcpus(spec: "MachineSpec") -> Entry | None:
    """Return the first registers of all vCPUs but one; None if the firmware does not know them."""
    image = spec.image
    return other_vcpus(bytes(image.rom)) if isinstance(image, FirmwareImage) else None


def encrypt(
    launch: Launch,
    spec: "MachineSpec",
    memory: GuestMemory,
    rom: Rom | None,
    vcpu: Callable[[int], Vcpu],
) -> Measurement:
    """Have the memory of a machine encrypted whose first vCPU has its first registers.

    Of firmware, the image is measured alone: the launch digest is the SHA-256 of it, and with
    SEV-ES of a page of registers of each vCPU behind it.

    Raises:
        KvmError: KVM or the firmware refused.
    """
    assert isinstance(memory, RecordedMemory)
    if launch.is_es and (entry := _other_vcpus(spec)):
        for index in range(1, spec.cpus):
            load_entry(vcpu(index), entry)
    launch.start()
    for region in memory.regions:
        launch.register(memory.hva + region.offset, region.size)
    if rom is not None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(rom.memory))
        launch.register(address, len(rom.memory))
        launch.encrypt(address, len(rom.memory))
    for gpa, size in memory.take_segments():
        region = next(one for one in memory.regions if one.gpa <= gpa < one.end)
        launch.encrypt(memory.hva + region.offset + gpa - region.gpa, size)
    return launch.finish()
