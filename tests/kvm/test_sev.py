"""AMD SEV and SEV-ES: the order of a launch, what is measured, and what is refused.

There is no such processor here: a double of KVM's and the firmware's part takes the commands, and
KVM runs a guest that is not encrypted.
"""

import hashlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import pytest

from tests import sev_firmware
from tests.kvm.test_boot_paths import LINUX, MULTIBOOT, OPENBSD, PVH
from tests.sev_firmware import Firmware, State
from tests.unit.boot.images import (
    KERNEL_ADDRESS,
    BzImage,
    guided_table,
    multiboot_elf,
    openbsd_kernel,
    pvh_kernel,
    vmlinux,
)
from tests.unit.boot.packing import PACKERS
from vmd.shared.pty import open_pty
from vmd.vm.console import Console
from vmd.vm.process import VmProcess
from vmd.wire.channel import Channel
from vmd.wire.internal import VM_AND_VMM, VmSpec
from vmm_kvm import primitives
from vmm_kvm.arch.x86.image import probe_image, read_firmware
from vmm_kvm.bits import MIB
from vmm_kvm.block.mapped import MappedImage
from vmm_kvm.boot.source import FileSource
from vmm_kvm.errors import BootError, KvmError, SpecError, VmmError
from vmm_kvm.kvm import sev
from vmm_kvm.kvm import sev_abi as abi
from vmm_kvm.kvm.cpuid import CpuidEntry
from vmm_kvm.kvm.sev import Launch, Policy, SevSpec
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import install_kick_signal
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.encryption import RecordedMemory
from vmm_kvm.machine.machine import Machine
from vmm_kvm.machine.spec import BASIC_DEVICES, DebugExitStatus, MachineSpec, Outcome
from vmm_kvm.primitives import Vmm
from vmm_kvm.virtio.balloon import BalloonSpec
from vmm_kvm.virtio.pmem import PmemSpec

pytestmark = pytest.mark.kvm

GOOD = 42
RESET_BLOCK = UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
C_BIT = 51
PAGE_TABLES = {"openbsd-amd64": (0x1_1000, 0x1_4000)}
POLICY = 0b11_1011
LAUNCH = ["LAUNCH_MEASURE of no length", "LAUNCH_MEASURE", "LAUNCH_FINISH", "GUEST_STATUS"]


@dataclass
class Bench:
    """What a machine needs, and its outcomes."""

    vmm: Vmm
    loop: EventLoop
    sev_fd: int
    outcomes: list[Outcome] = field(default_factory=list)
    sources: list[FileSource] = field(default_factory=list)

    def machine(self, firmware: Firmware, image: Path, **fields: object) -> Machine:
        """Build a machine whose memory is encrypted; nothing runs yet."""
        is_es = bool(fields.pop("is_es", False))
        is_restored = bool(fields.pop("is_restored", False))
        self.sources.append(FileSource.open(str(image)))
        probe = read_firmware if image.name == "firmware" else probe_image
        spec = MachineSpec(
            image=probe(self.sources[-1]),
            memory_size=64 * MIB,
            name="bench",
            sev=SevSpec(self.sev_fd, is_es, firmware.call),
        )
        return Machine(
            spec.but(**fields),
            self.vmm,
            self.loop,
            transmit=lambda _data: None,
            on_receive_room=lambda: None,
            on_outcome=self._ended,
            is_restored=is_restored,
        )

    def _ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.loop.call_soon(self.loop.stop)

    def run(self, machine: Machine) -> Outcome:
        """Run a machine to its end."""
        timer = self.loop.timer(self.loop.stop)
        timer.arm(self.loop.monotonic_ns() + 30_000_000_000)
        machine.start()
        self.loop.run()
        timer.cancel()
        (outcome,) = self.outcomes
        return outcome


def with_sev(kvm: Kvm, c_bit: int | None = C_BIT) -> Kvm:
    """Let KVM say that the processor has SEV."""
    others = (one for one in kvm.supported_cpuid() if one.function != 0x8000_001F)
    leaf = () if c_bit is None else (CpuidEntry(0x8000_001F, 0, 0, 0x1F, c_bit | 5 << 6, 509, 0),)
    kvm.known_cpuid = (*others, *leaf)
    return kvm


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    """A bench, closed afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install_kick_signal()
    sev_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    with Kvm() as kvm, Vmm(with_sev(kvm)) as vmm, EventLoop() as loop:
        made = Bench(vmm, loop, sev_fd)
        yield made
        for source in made.sources:
            source.close()
    os.close(sev_fd)


def uefi_firmware() -> bytes:
    """Return an image that looks like UEFI firmware; it needs no copy below 1 MiB."""
    image = bytearray(b"\xff" * (64 << 10))
    image[40:44] = b"_FVH"
    image[0x100:0x104] = bytes((0xB0, GOOD, 0xE6, 0xF4))  # mov $42, %al; out %al, $0xf4
    jump = 0x100 - 0xFFF3 & 0xFFFF
    image[-16:-13] = b"\xe9" + jump.to_bytes(2, "little")  # jmp 0x100
    return bytes(image)


IMAGES = {
    "bzimage-unpacked": BzImage(PACKERS["zstd"](vmlinux(LINUX))).build(),
    "bzimage-64-bit-entry": BzImage(entry64=LINUX).build(),
    "vmlinux": vmlinux(LINUX),
    "openbsd-amd64": openbsd_kernel(code=b"\x90" * 0x10 + OPENBSD),
    "firmware": uefi_firmware(),
}


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return each image that can run in encrypted memory, as a file of its name."""
    path = tmp_path / str(request.param)
    path.write_bytes(IMAGES[path.name])
    return path


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """Return a Linux kernel."""
    path = tmp_path / "vmlinux"
    path.write_bytes(IMAGES["vmlinux"])
    return path


# The launch of whole machines


def unmask(machine: Machine, name: str) -> int:
    """Do what hardware does with the C-bit of page tables; returns how many entries had it."""
    start, end = PAGE_TABLES.get(name, (0x1000, 0x7000))
    entries = machine.memory.view(start, end - start).cast("Q")
    masked = [at for at, entry in enumerate(entries) if entry >> C_BIT & 1]
    for at in masked:
        entries[at] &= ~(1 << C_BIT)
    return len(masked)


@pytest.mark.parametrize("is_es", [False, True])
def test_guest_finds_all_that_it_needs_encrypted(bench: Bench, image: Path, is_es: bool) -> None:
    """Every kernel and firmware runs though all that was not handed over is garbage."""
    firmware = Firmware(bench.sev_fd, spoils=True)
    with bench.machine(firmware, image, is_es=is_es, command_line=None) as machine:
        # PML4, PDPT and page directories of 4 GiB, or of 1 GiB.
        expected = {"firmware": 0, "openbsd-amd64": 514}.get(image.name, 2053)
        assert unmask(machine, image.name) == expected
        assert bench.run(machine) == DebugExitStatus(GOOD)


@pytest.mark.parametrize("is_es", [False, True])
def test_order_of_a_launch(bench: Bench, image: Path, is_es: bool) -> None:
    """The commands come in the firmware's order, with OpenBSD's policy, each piece once."""
    firmware = Firmware(bench.sev_fd)
    with bench.machine(firmware, image, is_es=is_es):
        guest = firmware.only()
    begin = ["ES_INIT" if is_es else "INIT", "LAUNCH_START", "GUEST_STATUS"]
    regions = 2 if image.name == "firmware" else 1
    pieces = ["REG_REGION"] * regions + ["LAUNCH_UPDATE_DATA"] * len(guest.given)
    if image.name == "firmware":  # the ROM's comes first
        pieces = ["REG_REGION", "REG_REGION", "LAUNCH_UPDATE_DATA"]
    registers = ["LAUNCH_UPDATE_VMSA"] if is_es else []
    assert firmware.log == [*begin, *pieces, *registers, *LAUNCH]
    assert guest.policy == (POLICY | sev_firmware.ES if is_es else POLICY)
    assert guest.state is State.RUNNING
    assert all(at % 16 == 0 and size % 16 == 0 for at, size in guest.given)


def test_all_vcpus_are_measured(bench: Bench, tmp_path: Path) -> None:
    """With SEV-ES every vCPU's registers are encrypted; the others start where firmware says."""
    path, at = tmp_path / "firmware", 0x0080_B004
    image = bytearray(uefi_firmware())
    table = guided_table((RESET_BLOCK, at.to_bytes(4, "little")))
    image[-32 - len(table) : -32] = table
    path.write_bytes(image)
    firmware = Firmware(bench.sev_fd, vcpus=3)
    seen: list[int] = []

    def look() -> None:
        (vm_id,) = (vm.id for vm in primitives.info(bench.vmm) if vm.id is not None)
        for index in range(3):
            vcpu = primitives.kvm_vcpu(bench.vmm, vm_id, index)
            seen.append(vcpu.get_sregs().cs.base + vcpu.get_regs().rip)

    firmware.on_registers = look
    with bench.machine(firmware, path, is_es=True, cpus=3, command_line=None) as machine:
        assert seen == [0xFFFF_FFF0, at, at]
        plain = bytes(image) + sev_firmware.REGISTERS * 3
        assert firmware.digest() == hashlib.sha256(plain).digest()
        assert machine.measurement is not None
        assert bench.run(machine) == DebugExitStatus(GOOD)
    plain_sev = Firmware(bench.sev_fd)
    bench.outcomes.clear()
    with bench.machine(plain_sev, path, cpus=3, command_line=None) as machine:
        assert machine.vcpu(1).get_sregs().cs.base == 0xFFFF_0000  # a SIPI will say where


@pytest.mark.parametrize("is_es", [False, True])
def test_measurement_is_of_the_plain_text(bench: Bench, image: Path, is_es: bool) -> None:
    """The digest is that of the ROM, or of what lies in the guest's memory, in ascending order."""
    firmware = Firmware(bench.sev_fd)
    with bench.machine(firmware, image, is_es=is_es) as machine:
        if image.name == "firmware":
            plain = IMAGES["firmware"]
        else:
            base = machine.memory.hva  # one region, from 0 on
            assert firmware.only().given == sorted(firmware.only().given)
            pieces = [(at - base, size) for at, size in firmware.only().given]
            plain = b"".join(machine.memory.read(*piece) for piece in pieces)
        digest = hashlib.sha256(plain + (sev_firmware.REGISTERS if is_es else b"")).digest()
        assert firmware.digest() == digest
        assert machine.measurement is not None
        assert machine.measurement.nonce == sev_firmware.NONCE
        policy = POLICY | sev_firmware.ES if is_es else POLICY
        assert machine.measurement.hmac == firmware.hmac(digest, policy)


def test_linux_is_measured_alike_every_time(bench: Bench, kernel: Path) -> None:
    """Nothing random is put into memory: who knows the kernel can compute the digest."""
    digests = set()
    for _ in range(2):
        firmware = Firmware(bench.sev_fd)
        with bench.machine(firmware, kernel, command_line="console=ttyS0"):
            digests.add(firmware.digest())
    firmware = Firmware(bench.sev_fd)
    with bench.machine(firmware, kernel, command_line="console=ttyS1"):
        assert firmware.digest() not in digests
    assert len(digests) == 1


def test_zeros_of_a_kernel_are_encrypted(bench: Bench, tmp_path: Path) -> None:
    """What a kernel's file leaves out, and memory is to have as zeros, is handed over."""
    path, bss = tmp_path / "kernel", 0x5000
    path.write_bytes(vmlinux(LINUX, bss))
    firmware = Firmware(bench.sev_fd)
    with bench.machine(firmware, path) as machine:
        at = machine.memory.hva + KERNEL_ADDRESS + MIB
        (size,) = (size for start, size in firmware.only().given if start <= at < start + size)
        assert size >= len(LINUX) + bss


def test_guest_learns_the_c_bit(bench: Bench, kernel: Path) -> None:
    """CPUID tells of SEV, and with SEV-ES of that; a VM with plain memory hears of neither."""
    for is_es, features in ((False, 1 << 1), (True, 1 << 1 | 1 << 3)):
        firmware = Firmware(bench.sev_fd)
        with bench.machine(firmware, kernel, is_es=is_es) as machine:
            leaves = {e.function: e for e in machine.vcpu(0).get_cpuid()}
            assert leaves[0x8000_001F][3:] == (features, C_BIT, 0, 0)
            assert leaves[0x8000_0000].eax >= 0x8000_001F
    with bench.machine(Firmware(bench.sev_fd), kernel, sev=None) as machine:
        leaves = {e.function: e for e in machine.vcpu(0).get_cpuid()}
        assert 0x8000_001F not in leaves or leaves[0x8000_001F][3:] == (0, 0, 0, 0)


def test_the_measurement_is_logged(
    bench: Bench, kernel: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A VM process logs OpenBSD's two lines, in hexadecimal."""
    firmware = Firmware(bench.sev_fd)
    pty = open_pty("test", os.getuid(), None)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    bench.sources.append(FileSource.open(str(kernel)))
    machine = MachineSpec(
        image=probe_image(bench.sources[-1]),
        memory_size=64 * MIB,
        sev=SevSpec(bench.sev_fd, call=firmware.call),
    )
    spec = VmSpec(id=1, name="web", memory=64 * MIB, cpus=1, boot=0, boot_path="k", tty=0, ring=0)
    with here, Channel(there, VM_AND_VMM) as channel, caplog.at_level("INFO"):
        console = Console(bench.loop, *(os.dup(fd) for fd in pty[1:]))
        process = VmProcess(
            bench.loop, channel, console, bench.vmm, machine, spec=spec, received=None, disks={}
        )
        process._machine.close()
        console.close()
    for fd in pty[1:]:
        os.close(fd)
    hmac = firmware.hmac(firmware.digest(), POLICY)
    assert f"measurement 0x{hmac.hex()}" in caplog.messages
    assert f"nonce 0x{sev_firmware.NONCE.hex()}" in caplog.messages


# What does not go together with it


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"is_restored": True}, "encrypted memory cannot be restored"),
        ({"shares_memory": True}, "encrypted memory cannot be cloned"),
        ({"devices": (*BASIC_DEVICES, BalloonSpec())}, "not with a balloon"),
        ({"is_es": True, "cpus": 2}, "SEV-ES with several vCPUs: only with UEFI firmware"),
    ],
)
def test_what_is_refused(bench: Bench, kernel: Path, fields: dict[str, object], text: str) -> None:
    """A machine with encrypted memory has no part that needs to read or move it."""
    firmware = Firmware(bench.sev_fd)
    with pytest.raises(SpecError, match=f"bench: .*{text}"):
        bench.machine(firmware, kernel, **fields)
    assert firmware.log == []


def test_memory_disks_are_refused(bench: Bench, kernel: Path, tmp_path: Path) -> None:
    """A disk that is memory would be plain memory."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB * 2))
    with MappedImage(str(path)) as mapped:
        devices = (*BASIC_DEVICES, PmemSpec(mapped, str(path)))
        with pytest.raises(SpecError, match="not with a disk of format pmem"):
            bench.machine(Firmware(bench.sev_fd), kernel, devices=devices)


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("bzimage", BzImage(entry32=LINUX).but(xloadflags=0).build(), "a 32-bit kernel"),
        ("pvh", pvh_kernel(KERNEL_ADDRESS, PVH), "its PVH entry knows no encrypted memory"),
        ("multiboot", multiboot_elf(code=MULTIBOOT), "a Multiboot kernel"),
        ("openbsd-i386", openbsd_kernel(is_64=False), "a 32-bit kernel, without SEV"),
        ("firmware", b"\x90" * (64 << 10), "use UEFI firmware"),
    ],
)
def test_images_that_are_refused(
    bench: Bench, tmp_path: Path, name: str, image: bytes, text: str
) -> None:
    """What knows nothing of the C-bit is refused by its name, and nothing is launched."""
    path = tmp_path / name
    path.write_bytes(image)
    firmware = Firmware(bench.sev_fd)
    with pytest.raises(BootError, match=f"{name}: .*{text}"):
        bench.machine(firmware, path)
    assert firmware.log == []


def test_without_sev(bench: Bench, kernel: Path) -> None:
    """A processor without SEV is told of in OpenBSD's words."""
    with_sev(bench.vmm.kvm, None)
    with pytest.raises(KvmError, match="SEV enabled but no C-bit reported"):
        bench.machine(Firmware(bench.sev_fd), kernel)


def test_vm_without_a_key_is_gone(bench: Bench, kernel: Path) -> None:
    """A failed launch leaves no VM, and says why it failed."""
    with pytest.raises(VmmError, match=r"KVM_SEV_INIT: .*all keys of the processor are in use"):
        bench.machine(Firmware(bench.sev_fd, keys=0), kernel)
    firmware = Firmware(bench.sev_fd)
    firmware.lockable = MIB
    with pytest.raises(KvmError, match=r"REG_REGION: Cannot allocate memory \(vmd's limit"):
        bench.machine(firmware, kernel)
    assert not [vm for vm in primitives.info(bench.vmm) if vm.id is not None]


def test_kvm_of_this_host_refuses(bench: Bench, kernel: Path) -> None:
    """Where KVM has no SEV, its real ioctl says so."""
    if Path(sev.DEVICE).exists():
        pytest.skip("this host has SEV: never tried")
    with pytest.raises(KvmError, match=r"KVM_SEV_INIT: .* \(KVM has no SEV here: load kvm_amd"):
        bench.machine(Firmware(bench.sev_fd), kernel, sev=SevSpec(bench.sev_fd))


# The firmware's state machine, and commands that it refuses


@pytest.fixture
def firmware() -> Firmware:
    """A firmware that knows /dev/sev as descriptor 7."""
    return Firmware(7)


@pytest.fixture
def memory() -> Iterator[RecordedMemory]:
    """A mebibyte of memory."""
    with RecordedMemory([(0, MIB)]) as made:
        yield made


def launch_of(bench: Bench, firmware: Firmware, *, is_es: bool = False, fd: int = 7) -> Launch:
    """Return the launch of a VM whose descriptor is 3."""
    launch = Launch(bench.vmm.kvm, SevSpec(fd, is_es, firmware.call), C_BIT)
    launch.begin(3)
    return launch


def test_launch_out_of_order(bench: Bench, firmware: Firmware, memory: RecordedMemory) -> None:
    """Commands before, after and instead of their turn are refused, with the firmware's reason."""
    wrong = r"Input/output error \(firmware: invalid guest state, 0x2\)"
    launch = launch_of(bench, firmware)
    launch.register(memory.hva, MIB)
    with pytest.raises(KvmError, match=f"KVM_SEV_LAUNCH_UPDATE_DATA: {wrong}"):
        launch.encrypt(memory.hva, 16)
    with pytest.raises(KvmError, match=f"KVM_SEV_LAUNCH_MEASURE: {wrong}"):
        launch.finish()
    launch.start()
    with pytest.raises(KvmError, match=f"KVM_SEV_LAUNCH_START: {wrong}"):
        launch.start()
    launch.encrypt(memory.hva, 16)
    launch.finish()
    with pytest.raises(KvmError, match=f"KVM_SEV_LAUNCH_UPDATE_DATA: {wrong}"):
        launch.encrypt(memory.hva + 16, 16)
    with pytest.raises(KvmError, match=f"KVM_SEV_LAUNCH_MEASURE: {wrong}"):
        launch.finish()
    with pytest.raises(KvmError, match="KVM_SEV_INIT: Invalid argument"):
        launch.begin(3)
    assert firmware.only().plain == [bytes(16)]


def test_launch_that_has_not_begun(bench: Bench, firmware: Firmware) -> None:
    """KVM knows no command for a VM that is not encrypted."""
    launch = Launch(bench.vmm.kvm, SevSpec(7, call=firmware.call), C_BIT)
    with pytest.raises(KvmError, match="KVM_SEV_LAUNCH_START: Inappropriate ioctl"):
        launch.start()
    assert firmware.log == []


def test_another_device(bench: Bench, firmware: Firmware) -> None:
    """A descriptor that is not /dev/sev's reaches no firmware."""
    launch = launch_of(bench, firmware, fd=8)
    with pytest.raises(KvmError, match="KVM_SEV_LAUNCH_START: Bad file descriptor"):
        launch.start()


def test_alignment(bench: Bench, firmware: Firmware, memory: RecordedMemory) -> None:
    """Whole blocks are handed over, also for odd addresses; the firmware takes nothing else."""
    launch = launch_of(bench, firmware)
    launch.start()
    launch.register(memory.hva, MIB)
    launch.encrypt(memory.hva + 0x1001, 0x1E)
    assert firmware.only().given == [(memory.hva + 0x1000, 0x20)]
    for at, size, text in ((1, 16, "invalid address, 0x9"), (32, 8, "invalid len, 0x4")):
        update = abi.kvm_sev_launch_update_data(uaddr=memory.hva + at, len=size)
        with pytest.raises(KvmError, match=text):
            launch._command(abi.KVM_SEV_LAUNCH_UPDATE_DATA, update)


def test_memory_that_may_move(bench: Bench, firmware: Firmware, memory: RecordedMemory) -> None:
    """Memory that was not registered is not encrypted; a part of a page is not registered."""
    launch = launch_of(bench, firmware)
    launch.start()
    with pytest.raises(KvmError, match="KVM_SEV_LAUNCH_UPDATE_DATA: Invalid argument"):
        launch.encrypt(memory.hva, 16)
    with pytest.raises(KvmError, match="KVM_MEMORY_ENCRYPT_REG_REGION: Invalid argument"):
        launch.register(memory.hva, 100)


def test_registers_only_with_es(bench: Bench, firmware: Firmware) -> None:
    """The policy has to name SEV-ES if the VM has it, and registers are encrypted only then."""
    launch = launch_of(bench, firmware)
    launch.policy |= Policy.ES
    with pytest.raises(KvmError, match=r"KVM_SEV_LAUNCH_START: .*policy failure, 0x7"):
        launch.start()
    launch.policy &= ~Policy.ES
    launch.start()
    with pytest.raises(KvmError, match="KVM_SEV_LAUNCH_UPDATE_VMSA: Inappropriate ioctl"):
        launch._command(abi.KVM_SEV_LAUNCH_UPDATE_VMSA)


class NewerKvm(Kvm):
    """KVM of Linux 6.10, which has types of VMs."""

    def check_extension(self, capability: int) -> int:
        """Offer the types of VMs with SEV."""
        return (
            0b1_1101 if capability == abi.KVM_CAP_VM_TYPES else super().check_extension(capability)
        )


@pytest.mark.parametrize(("is_es", "vm_type"), [(False, 2), (True, 3)])
def test_newer_kernels(firmware: Firmware, is_es: bool, vm_type: int) -> None:
    """Where KVM has types of VMs, the VM is made as one, and begins by INIT2."""
    with NewerKvm() as kvm:
        launch = Launch(kvm, SevSpec(7, is_es, firmware.call), C_BIT)
        assert launch.vm_type == vm_type
        launch.begin(3)
    assert firmware.log == ["INIT2"]


def test_platform(firmware: Firmware) -> None:
    """The firmware tells its version; what is no /dev/sev is refused."""
    firmware.flags = abi.SEV_STATUS_FLAGS_CONFIG_ES
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        assert sev.platform(fd, firmware.call) == (0, 24, 7, True)
        with pytest.raises(KvmError, match="/dev/sev: Inappropriate ioctl"):
            sev.platform(fd)
    finally:
        os.close(fd)


# Segments


def test_segments_are_whole_blocks_and_disjoint(memory: RecordedMemory) -> None:
    """What was written, or viewed for writing, is noted once, until it is taken; reads are not."""
    memory.write(0x1005, b"five bytes")
    memory.write(0x1000, b"beside")
    memory.view(0x3000, 0x10)
    memory.write(0x2FFF, b"a byte, and more than the page before")
    memory.read(0x8000, 16)
    memory.write(0x9000, b"")
    assert list(memory.take_segments()) == [(0x1000, 0x10), (0x2FF0, 0x40)]
    memory.write(0x5000, b"later")
    assert list(memory.take_segments()) == [(0x1000, 0x10), (0x2FF0, 0x40)]
