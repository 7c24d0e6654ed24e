"""Each device's state: changed by accesses, saved, restored, and compared by reading it back."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vmm_kvm
from tests.fakes import FakeClock
from tests.virtio_driver import DriverQueue
from tests.virtio_pci_driver import BusDriver
from tests.vsock_driver import CID, VsockDriver
from vmm_kvm.arch.x86 import layout
from vmm_kvm.arch.x86.image import FirmwareImage, open_image
from vmm_kvm.bits import MIB
from vmm_kvm.block.image import Format
from vmm_kvm.block.mapped import MappedImage
from vmm_kvm.boot.firmware import selftest_path
from vmm_kvm.boot.nvram import Variables
from vmm_kvm.bus import Bus
from vmm_kvm.devices.acpi_pm import Pm1Enable
from vmm_kvm.devices.uart16550 import Lcr, Mcr
from vmm_kvm.errors import StateError
from vmm_kvm.images.opening import open_image as open_disk
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import install_kick_signal
from vmm_kvm.machine.machine import Machine
from vmm_kvm.machine.net import NetSpec
from vmm_kvm.machine.spec import MachineSpec
from vmm_kvm.machine.state import MachineState, restore, save
from vmm_kvm.net.paths import StreamPath, Traffic
from vmm_kvm.pci.config import PciFunction
from vmm_kvm.pci.i6300esb import WatchdogSpec
from vmm_kvm.pci.ids import VENDOR_INTEL, Command, Register
from vmm_kvm.pci.msix import Msix
from vmm_kvm.primitives import Vmm
from vmm_kvm.scsi.cdrom import CdRom
from vmm_kvm.scsi.spc import Opcode
from vmm_kvm.state import Json, PartState
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.balloon import BalloonSpec
from vmm_kvm.virtio.blk import BlkSpec
from vmm_kvm.virtio.common_cfg import CommonCfg
from vmm_kvm.virtio.console import ConsoleSpec
from vmm_kvm.virtio.pmem import PmemSpec
from vmm_kvm.virtio.rng import RngSpec
from vmm_kvm.virtio.scsi import ScsiCdSpec
from vmm_kvm.virtio.vmmci import Config as VmmciConfig
from vmm_kvm.virtio.vmmci import Register as VmmciRegister
from vmm_kvm.virtio.vmmci import VmmciSpec
from vmm_kvm.virtio.vsock import VsockSpec

pytestmark = pytest.mark.kvm

SECOND = 1_000_000_000
DEADLINE_S = 20
FLASH_SIZE = 64 << 10
LLADDR = b"\xfe\xe1\xbb\0\0\1"
OTHER = b"\xfe\xe1\xbb\0\0\2"
GROUP = b"\1\0\x5e\0\0\1"
RAM_SIZE = 16 * MIB
_FIRMWARE_VOLUME = bytes(40) + b"_FVH"
_PCIEXBAR, _ECAM = 0x60, 0xB000_0000
KVM_PARTS = ("clock", "vcpu0", "vcpu1", "irqchip", "pit")
SLOT_RNG, SLOT_NET, SLOT_BLK, SLOT_PMEM, SLOT_CD, SLOT_CONSOLE, SLOT_VSOCK = range(1, 8)
SLOT_BALLOON, SLOT_WATCHDOG, SLOT_VMMCI = 8, 9, 10

# Parts of another class's state, whose `save` and `restore` call theirs.
INNER = {CommonCfg, Msix, PciFunction}

# Fields that are equal in machines of one specification: restore refuses a difference.
SAME = {
    "BlkState": {"capacity", "is_read_only"},
    "PmemState": {"gpa", "size"},
    "RomState": {"gpa", "contents"},
    "CdRomState": {"blocks"},
    "VsockState": {"cid"},
    "NetState": {"pairs", "offloads"},  # a stream has one pair and no offloads
}


@dataclass
class Stand:
    """The resources of machines of one specification; one after the other."""

    vmm: Vmm
    directory: Path
    stack: ExitStack
    clock: FakeClock = field(default_factory=FakeClock)
    output: bytearray = field(default_factory=bytearray)
    on_output: Callable[[], None] = lambda: None

    def spec(self) -> MachineSpec:
        """Describe a machine with every kind of device."""
        for name, size in (("disk", MIB), ("cd", 64 << 10), ("pmem", 2 * MIB)):
            (self.directory / name).write_bytes(bytes(size))
        ours, theirs = socket.socketpair()
        self.stack.callback(ours.close)
        self.stack.callback(theirs.close)
        enter = self.stack.enter_context
        disk = open_disk(str(self.directory / "disk"), Format.RAW, read_only=False)
        self.stack.callback(disk.close)
        medium = open_disk(str(self.directory / "cd"), Format.RAW, read_only=True)
        self.stack.callback(medium.close)
        pmem = enter(MappedImage(str(self.directory / "pmem"), is_private=True))
        net = NetSpec(LLADDR, StreamPath(ours.fileno(), Traffic()), "net")
        return MachineSpec(
            image=open_image(str(selftest_path())),
            memory_size=RAM_SIZE,
            cpus=2,
            devices=(
                *(RngSpec(), net, BlkSpec(disk, "disk"), PmemSpec(pmem, "pmem")),
                *(ScsiCdSpec(medium), ConsoleSpec(), VsockSpec(CID), BalloonSpec()),
                *(WatchdogSpec(), VmmciSpec()),
            ),
            variables=enter(Variables(b"\xff" * FLASH_SIZE, None)),
        )

    def successor(self, spec: MachineSpec) -> MachineSpec:
        """Describe the machine that continues, whose flash is another file."""
        variables = self.stack.enter_context(Variables(bytes(FLASH_SIZE), None))
        return spec.but(variables=variables)

    def machine(self, spec: MachineSpec, *, is_restored: bool = False) -> Machine:
        """Build one, paused."""

        def transmit(data: bytes) -> None:
            self.output.extend(data)
            self.on_output()

        machine = self.stack.enter_context(
            Machine(
                spec,
                self.vmm,
                self.clock,
                transmit=transmit,
                on_receive_room=lambda: None,
                on_outcome=lambda _: None,
                is_restored=is_restored,
            )
        )
        if not is_restored:
            machine.pause()
        return machine


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    """Machines on real KVM, with a clock that only the test moves."""
    install_kick_signal()
    with Kvm() as kvm, Vmm(kvm) as vmm, ExitStack() as stack:
        yield Stand(vmm, tmp_path, stack)


class Driver(BusDriver):
    """A guest's driver of one of the machine's virtio devices."""

    def __init__(self, machine: Machine, slot: int) -> None:
        super().__init__(machine.pio, machine.mmio, slot)
        self.ram = machine.memory.view(0, RAM_SIZE)
        self.base = MIB + slot * MIB
        self.queues: dict[int, DriverQueue] = {}

    def begin(self, queues: tuple[int, ...], *, features: int | None = None) -> None:
        """Start the device with these queues."""
        self.queues = {
            index: DriverQueue(self.ram, 8, self.base + 0x1000 * index) for index in queues
        }
        self.start(self.queues, features=features, msix=False)

    def notify(self, index: int) -> None:
        """Notify by the port."""
        self.pio.write(self.notify_port(index), 2, index)

    def request(self, index: int, data: bytes, answer: int) -> bytes:
        """Send a request; wait for and return its answer."""
        at = self.base + 0x8_0000
        self.ram[at : at + len(data)] = data
        buffers = ((at, len(data), False),) if data else ()
        self.queues[index].add(*buffers, (at + 0x4000, answer, True))
        self.notify(index)
        self.wait(lambda: bool(self.queues[index].used()))
        return bytes(self.ram[at + 0x4000 : at + 0x4000 + answer])

    @staticmethod
    def wait(condition: Callable[[], bool]) -> None:
        """Wait for the effect of a device's thread."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, "the device does nothing"
            time.sleep(0.001)


def change_everything(stand: Stand, machine: Machine) -> None:
    """Change every register by each access that a guest, or the host, can do."""
    machine.resume()
    _change_ports(stand, machine)
    _change_watchdog(stand, machine)
    _change_virtio(stand, machine)
    _change_vmmci(machine)
    _change_flash(machine)
    machine.pause()
    _change_pci(machine)
    machine.become_another(is_copy=False)


def _change_ports(stand: Stand, machine: Machine) -> None:
    pio = machine.pio
    com = layout.PORT_COM1
    for offset, value in (
        *((3, int(Lcr.DLAB)), (0, 7), (1, 1), (3, 3)),  # divisor
        *((4, Mcr.LOOP | Mcr.RTS), (4, 0x0B)),  # MSR's deltas
        *((2, 0xC1), (7, 0x5A)),
    ):
        pio.write(com + offset, 1, value)
    machine.uart.receive(bytes(range(0x41, 0x41 + 16)))
    pio.read(com, 1)
    machine.uart.receive(b"zz")
    machine.uart.receive_break()
    pio.write(com + 1, 1, 0x07)
    rtc = layout.PORT_RTC
    for register, value in ((0x0A, 0x2F), (0x0B, 0x42), (0x06, 0x05), (0x00, 0x21), (0x44, 0x99)):
        pio.write(rtc, 1, register)
        pio.write(rtc + 1, 1, value)
    pio.write(layout.PORT_PM1A_EVENT + 2, 2, Pm1Enable.PWRBTN)
    pio.write(layout.PORT_PM1A_CONTROL, 2, 5 << 10)
    stand.clock.advance(700 * SECOND)
    machine.acpi_pm.press_power_button()
    pio.write(layout.PORT_I8042_COMMAND, 1, 0xD0)
    pio.write(layout.PORT_I8042_COMMAND, 1, 0xD1)
    pio.write(layout.PORT_SYSTEM_CONTROL_A, 1, 0)
    pio.write(layout.PORT_FW_CFG, 2, 0x19)
    pio.read(layout.PORT_FW_CFG + 1, 1)
    pio.write(layout.PORT_FW_CFG + 4, 4, 0x0100_0000)


def _change_virtio(stand: Stand, machine: Machine) -> None:
    rng = Driver(machine, SLOT_RNG)
    rng.begin((0,))
    assert any(rng.request(0, b"", 512))
    rng.enable_msix()
    rng.mask(1, is_masked=True)
    rng.write(abi.VIRTIO_PCI_COMMON_Q_SELECT, 2, 0)
    rng.write(abi.VIRTIO_PCI_COMMON_Q_MSIX, 2, 1)
    rng.write(abi.VIRTIO_PCI_COMMON_MSIX, 2, 0)
    assert any(rng.request(0, b"", 256))  # a masked vector's interrupt is pending
    blk = Driver(machine, SLOT_BLK)
    blk.begin((0,))
    assert blk.request(0, bytes(16), 513)[-1] == abi.VIRTIO_BLK_S_OK
    Driver(machine, SLOT_PMEM).begin((0,))
    _change_net(machine)
    _change_cdrom(machine)
    _change_console(stand, machine)
    Driver(machine, SLOT_VSOCK).begin((0, 1, 2))
    balloon = Driver(machine, SLOT_BALLOON)
    balloon.begin((0, 1, 2, 3))
    machine.mmio.write(balloon.structures[abi.VIRTIO_PCI_CAP_DEVICE_CFG] + 4, 4, 77)


def _change_net(machine: Machine) -> None:
    net = Driver(machine, SLOT_NET)
    net.begin((0, 1, 2))
    rx = abi.VIRTIO_NET_CTRL_RX
    table = b"\1\0\0\0" + OTHER + b"\1\0\0\0" + GROUP
    for command in (
        bytes((rx, abi.VIRTIO_NET_CTRL_RX_PROMISC, 0)),
        bytes((abi.VIRTIO_NET_CTRL_MAC, abi.VIRTIO_NET_CTRL_MAC_TABLE_SET)) + table,
        bytes((rx, abi.VIRTIO_NET_CTRL_RX_ALLMULTI, 1)),
        bytes((rx, abi.VIRTIO_NET_CTRL_RX_ALLUNI, 1)),
        bytes((rx, abi.VIRTIO_NET_CTRL_RX_NOMULTI, 1)),
        bytes((rx, abi.VIRTIO_NET_CTRL_RX_NOUNI, 1)),
        bytes((rx, abi.VIRTIO_NET_CTRL_RX_NOBCAST, 1)),
        bytes((abi.VIRTIO_NET_CTRL_MAC, abi.VIRTIO_NET_CTRL_MAC_ADDR_SET)) + OTHER,
        bytes((abi.VIRTIO_NET_CTRL_VLAN, abi.VIRTIO_NET_CTRL_VLAN_ADD, 7, 0)),
    ):
        assert net.request(2, command, 1) == bytes((abi.VIRTIO_NET_OK,))
    machine.set_link(0, is_up=False)
    machine.pause()
    machine.resume()  # which announces the address


def _change_cdrom(machine: Machine) -> None:
    drive = Driver(machine, SLOT_CD)
    drive.begin((0, 1, 2))
    config = drive.structures[abi.VIRTIO_PCI_CAP_DEVICE_CFG]
    machine.mmio.write(config + 20, 4, 64)
    machine.mmio.write(config + 24, 4, 16)
    cdrom = _drive(machine)
    eject = bytes((Opcode.START_STOP_UNIT, 0, 0, 0, 2, 0))
    for command in (
        eject,
        eject[:4] + b"\3\0",  # insert it again: the drive reports that the medium may have changed
        bytes((Opcode.TEST_UNIT_READY,)),
        eject,
        bytes((Opcode.PREVENT_ALLOW_MEDIUM_REMOVAL, 0, 0, 0, 1, 0)),
    ):
        cdrom.execute(command)


def _drive(machine: Machine) -> CdRom:
    return next(part.device for part in machine.parts() if isinstance(part.device, CdRom))


def _change_console(stand: Stand, machine: Machine) -> None:
    console = Driver(machine, SLOT_CONSOLE)
    console.begin((0, 1))
    console.wait(lambda: machine.receive(b"typed") == 5)
    machine.resize_console(132, 50)
    console.device_config(0, 4)
    stand.on_output = lambda: machine.throttle(True)
    at = console.base + 0x1_0000
    console.ram[at : at + 0x18000] = b"x" * 0x18000
    console.queues[1].add((at, 0x18000, False))
    stand.output.clear()
    console.notify(1)
    console.wait(lambda: len(stand.output) == 0x10000)


def _change_watchdog(stand: Stand, machine: Machine) -> None:
    base = _bar(machine, SLOT_WATCHDOG, 0)

    def load(ticks: int) -> None:
        for offset in (0x0, 0x4):
            for step in (0x80, 0x86):
                machine.mmio.write(base + 0xC, 2, step)
            machine.mmio.write(base + offset, 4, ticks + offset)

    load(1)
    for offset, size, value in ((0x60, 2, 0x27), (0x68, 1, 7)):
        _select(machine, SLOT_WATCHDOG, offset)
        machine.pio.write(layout.PORT_PCI_CONFIG + 4, size, value)
    for _ in range(3):  # both timers, and the first one again
        stand.clock.advance(SECOND // 1000)
    load(0x12345)
    machine.mmio.write(base + 0xC, 2, 0x80)


def _change_vmmci(machine: Machine) -> None:
    pio = machine.pio
    base = _bar(machine, SLOT_VMMCI, 0)
    for register, size, value in (
        (VmmciRegister.GUEST_FEATURES, 4, 7),
        (VmmciRegister.QUEUE_SELECT, 2, 3),
        (VmmciRegister.STATUS, 1, 7),
    ):
        pio.write(base + register, size, value)
    pio.read(base + VmmciRegister.CONFIG + VmmciConfig.SECONDS, 4)
    assert machine.press_power_button()


def _change_flash(machine: Machine) -> None:
    image = machine.spec.image
    assert isinstance(image, FirmwareImage)
    base = image.rom_base - FLASH_SIZE
    for offset, value in (
        *((0, 0x40), (0, 0x12)),  # program a byte
        *((0, 0x20), (0, 0x00)),  # erase, and do not confirm
        *((0x1000, 0xE8), (0x1000, 3), (0x1001, 0x77)),  # begin a buffered write
    ):
        machine.mmio.write(base + offset, 1, value)


def _change_pci(machine: Machine) -> None:
    machine.pio.write(layout.PORT_RESET, 1, 0b010)
    for slot in (SLOT_BLK, SLOT_NET):
        _config_write(machine, slot, Register.INTERRUPT_LINE, 1, 14 - slot)
    # Move a BAR: its registers are at another address from now on.
    bar = _bar(machine, SLOT_BLK, 4)
    _config_write(machine, SLOT_BLK, Register.BAR0 + 16, 4, bar + 16 * MIB)
    _config_write(machine, SLOT_PMEM, Register.COMMAND, 2, Command.MEMORY_SPACE)


def _select(machine: Machine, slot: int, register: int) -> None:
    machine.pio.write(layout.PORT_PCI_CONFIG, 4, 1 << 31 | slot << 11 | register & 0xFC)


def _config_write(machine: Machine, slot: int, register: int, size: int, value: int) -> None:
    _select(machine, slot, register)
    machine.pio.write(layout.PORT_PCI_CONFIG + 4 + (register & 3), size, value)


def _bar(machine: Machine, slot: int, index: int) -> int:
    _select(machine, slot, Register.BAR0 + 4 * index)
    value = machine.pio.read(layout.PORT_PCI_CONFIG + 4, 4)
    return value & ~(3 if value & 1 else 15)


def observe(machine: Machine) -> Iterator[tuple[str, int]]:
    """Yield all that a guest can read; reads change things, equally in every machine."""
    yield "address", machine.pio.read(layout.PORT_PCI_CONFIG, 4)
    for slot in range(32):
        for register in range(0, 256, 4):
            _select(machine, slot, register)
            yield f"{slot}:{register:#x}", machine.pio.read(layout.PORT_PCI_CONFIG + 4, 4)
    for slot in (SLOT_RNG, SLOT_NET, SLOT_BLK, SLOT_CD, SLOT_CONSOLE, SLOT_VSOCK, SLOT_BALLOON):
        driver = Driver(machine, slot)
        for queue in range(4):
            driver.write(abi.VIRTIO_PCI_COMMON_Q_SELECT, 2, queue)
            for at in range(0, 64, 4):
                yield f"{slot} queue {queue} {at}", driver.read(at, 4)
        for half in range(3):
            driver.write(abi.VIRTIO_PCI_COMMON_GFSELECT, 4, half)
            yield f"{slot} features", driver.read(abi.VIRTIO_PCI_COMMON_GF, 4)
    for name, bus in (("port", machine.pio), ("memory", machine.mmio)):
        for address in _claimed(bus):
            yield f"{name} {address:#x}", bus.read(address, 1)


def _claimed(bus: Bus) -> Iterator[int]:
    """Yield claimed addresses: of large ranges the first and last KiB."""
    address = 0
    for base, end in bus.ranges():
        if end - base <= 0x4000:
            yield from range(base, end)
        else:
            yield from (*range(base, base + 0x400), *range(end - 0x400, end))
        address = end
    assert address


def _through_json(state: MachineState) -> MachineState:
    return state._replace(parts=json.loads(json.dumps(state.parts)))


def _of_devices(state: MachineState) -> MachineState:
    """Leave out KVM's part, whose time advances."""
    return MachineState(
        {name: part for name, part in state.parts.items() if name not in KVM_PARTS},
        {name: blob for name, blob in state.blobs.items() if name.split("/")[0] not in KVM_PARTS},
    )


@pytest.mark.parametrize("is_uefi", [False, True])
def test_a_restored_machine_looks_the_same(stand: Stand, is_uefi: bool) -> None:
    """Ports, configuration space, BARs and pending work are equal after a restore."""
    spec = stand.spec()
    if is_uefi:  # another host bridge
        rom = _FIRMWARE_VOLUME.ljust(64 << 10, b"\xff")
        spec = spec.but(image=FirmwareImage("uefi", rom, len(rom)))
    first = stand.machine(spec)
    change_everything(stand, first)
    if is_uefi:
        _config_write(first, 0, _PCIEXBAR, 4, _ECAM | 1)
        assert first.mmio.read(_ECAM, 2) == VENDOR_INTEL
    state = _through_json(save(first))
    memory = first.memory.read(0, RAM_SIZE)
    first_seen = list(observe(first))
    second = stand.machine(stand.successor(spec), is_restored=True)
    second.memory.write(0, memory)
    restore(second, state)
    expected, found = _of_devices(state), _of_devices(save(second))
    assert expected.parts.keys() == found.parts.keys()
    assert expected.blobs == found.blobs
    for name, part in found.parts.items():
        assert (name, expected.parts[name]) == (name, part)
    assert list(observe(second)) == first_seen
    _goes_on(stand, second)


def _goes_on(stand: Stand, machine: Machine) -> None:
    """Pending work is done, and devices continue to serve their queues."""
    stand.on_output = lambda: None
    stand.output.clear()
    machine.resume()
    machine.throttle(False)
    Driver.wait(lambda: stand.output == b"x" * 0x8000)  # the rest of the half-printed output
    rng = Driver(machine, SLOT_RNG)
    at = rng.base + 0x10_000
    queue = DriverQueue(rng.ram, 8, rng.base)
    queue.next_descriptor = queue.added = queue.seen = 2
    queue.add((at, 64, True))
    rng.notify(0)
    rng.wait(lambda: bool(queue.used()))
    assert any(rng.ram[at : at + 64])
    vsock = Driver(machine, SLOT_VSOCK)
    queues = {index: DriverQueue(vsock.ram, 8, vsock.base + 0x1000 * index) for index in range(3)}
    driver = VsockDriver(queues, vsock.base + 0x10_000, vsock.notify)
    driver.offer_event()
    vsock.wait(lambda: driver.events() == [0])  # the event: its connections are gone
    machine.pause()


def test_a_disk_under_load(stand: Stand) -> None:
    """Over several machines each request is answered once, and all writes are on the disk."""
    spec = stand.spec()
    machine = stand.machine(spec)
    machine.resume()
    driver = Driver(machine, SLOT_BLK)
    queue = DriverQueue(driver.ram, 64, driver.base)
    driver.start({0: queue}, msix=False)
    answered = 0
    for number in range(_LOAD_ROUNDS):
        for request in range(_LOAD_REQUESTS):
            _add_write(queue, driver.base, number * _LOAD_REQUESTS + request)
        driver.notify(0)
        machine.pause()  # with requests pending, or all done, or none
        state, memory = save(machine), machine.memory.read(0, RAM_SIZE)
        machine = stand.machine(stand.successor(spec), is_restored=True)
        machine.memory.write(0, memory)
        restore(machine, _through_json(state))
        machine.resume()
        driver = Driver(machine, SLOT_BLK)
        queue.memory = driver.ram
        expected = (number + 1) * _LOAD_REQUESTS
        driver.wait(partial(_has_used, queue, expected))
        answered += len(queue.used())
    machine.pause()
    total = _LOAD_ROUNDS * _LOAD_REQUESTS
    assert answered == total
    written = (stand.directory / "disk").read_bytes()[: 512 * total]
    assert written == b"".join(_sector(number) for number in range(total))


_LOAD_ROUNDS, _LOAD_REQUESTS = 8, 20


def _has_used(queue: DriverQueue, index: int) -> bool:
    return queue.used_index == index


def _sector(number: int) -> bytes:
    return number.to_bytes(4, "little") * 128


def _add_write(queue: DriverQueue, base: int, number: int) -> None:
    """Make a request available that writes one sector."""
    at = base + 0x1_0000 + 0x400 * (number % _LOAD_REQUESTS)
    queue.put(at, "IIQ", abi.VIRTIO_BLK_T_OUT, 0, number)
    queue.memory[at + 0x100 : at + 0x300] = _sector(number)
    queue.add((at, 16, False), (at + 0x100, 512, False), (at + 0x300, 1, True))


def test_every_field_is_one_that_a_guest_can_change(stand: Stand) -> None:
    """Each field of a record differs from a new machine's, or is known to be equal in all."""
    spec = stand.spec()
    first = stand.machine(spec)
    change_everything(stand, first)
    fresh = stand.machine(stand.successor(spec), is_restored=True)
    same: dict[str, set[str]] = {}
    _note_same(first, fresh, same)
    _drive(first).reset()  # the next command learns of it, but the drive is not locked any more
    _note_same(first, fresh, same)
    expected = {kind: {"version"} | SAME.get(kind, set()) for kind in same}
    assert expected == same


def _note_same(machine: Machine, fresh: Machine, same: dict[str, set[str]]) -> None:
    """Remove from `same`, fields by the name of their record, those that differ somewhere."""
    others = {part.name: part for part in fresh.parts()}
    for part in machine.parts():
        old, new = _record(others[part.name].device), _record(part.device)
        kind = type(new).__name__
        equal = {name for name, value in vars(new).items() if value == getattr(old, name)}
        same[kind] = same.get(kind, equal) & equal


def _record(device: object) -> PartState:
    record: PartState = getattr(device, "save")()  # noqa: B009 - of any type
    return record


def test_every_class_with_a_state_is_in_the_walk(stand: Stand) -> None:
    """A part that the machine above lacks, or that its owner forgets, fails here."""
    machine = stand.machine(stand.spec())
    walked = {type(part.device) for part in machine.parts()}
    found = set()
    for info in pkgutil.walk_packages(vmm_kvm.__path__, "vmm_kvm."):
        module = importlib.import_module(info.name)
        found |= {
            cls
            for _, cls in inspect.getmembers(module, inspect.isclass)
            if cls.__module__ == info.name
            and inspect.isfunction(getattr(cls, "save", None))
            and inspect.isfunction(getattr(cls, "restore", None))
            and not getattr(cls, "_is_protocol", False)
            and cls.__name__ != "Part"
        }
    assert found == walked | INNER


def test_a_machine_with_other_devices_is_refused(stand: Stand) -> None:
    """The names of the parts identify them."""
    spec = stand.spec()
    state = save(stand.machine(spec))
    other = stand.machine(spec.but(devices=spec.devices[:-1]), is_restored=True)
    with pytest.raises(StateError, match=r"'pci\.00:0a\.0/vmmci': not in this machine"):
        restore(other, state)


def _paths(value: Json, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path to every value within `value`."""
    yield path
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _paths(inner, (*path, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _paths(inner, (*path, number))


def _changed(value: Json, path: tuple[str | int, ...], new: Json) -> Json:
    """Return a copy of `value` with `new` at the end of `path`."""
    if not path:
        return new
    first, *rest = path
    if isinstance(value, dict):
        return {
            name: _changed(inner, tuple(rest), new) if name == first else inner
            for name, inner in value.items()
        }
    assert isinstance(value, list)
    return [
        _changed(inner, tuple(rest), new) if number == first else inner
        for number, inner in enumerate(value)
    ]


_JSON: st.SearchStrategy[Json] = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just([]) | st.just({})
)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_mutated_state_is_taken_or_refused(
    mutable: tuple[Machine, MachineState], data: st.DataObject
) -> None:
    """With any value anywhere, the device continues from the state, or refuses it in one line."""
    machine, state = mutable
    name = data.draw(st.sampled_from([part.name for part in machine.parts()]))
    fields = state.parts[name]
    path = data.draw(st.sampled_from(list(_paths(fields))))
    changed = _changed(fields, path, data.draw(_JSON | st.integers(0, 1 << 16)))
    part = next(part for part in machine.parts() if part.name == name)
    prefix = f"{name}/"
    blobs = {
        blob.removeprefix(prefix): value
        for blob, value in state.blobs.items()
        if blob.rpartition("/")[0] == name
    }
    try:
        part.restore(changed, blobs)
    except StateError as err:
        assert "\n" not in str(err)  # noqa: PT017 - most are refused, and some are not
    for _ in observe(machine):
        pass


@pytest.fixture
def mutable(stand: Stand) -> tuple[Machine, MachineState]:
    """A machine, and a state from which it can continue."""
    spec = stand.spec()
    first = stand.machine(spec)
    change_everything(stand, first)
    return stand.machine(stand.successor(spec), is_restored=True), save(first)
