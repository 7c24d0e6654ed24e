"""Fuzz target: fw_cfg's ports and its DMA, with requests anywhere in guest memory.

The device raises nothing, RAM outside the range of a request stays unchanged, and a device that is
restored from a snapshot behaves like the first one.
"""

from __future__ import annotations

from tests.fuzz.inputs import Input
from vmm_kvm.arch.x86.layout import ram_ranges
from vmm_kvm.devices.fw_cfg import SIZE, Control, FwCfg, Key, Register
from vmm_kvm.memory import GuestMemory

MEMORY_SIZE = 64 << 10
STEPS_MAX = 200
FILES = (("etc/e820", bytes(range(40))), ("opt/long", bytes(5000)), ("opt/empty", b""))
_REQUEST_AT = 0x100


def _device(memory: GuestMemory) -> FwCfg:
    device = FwCfg(memory)
    device.add_item(Key.NB_CPUS, b"\x04\x00")
    for name, data in FILES:
        device.add_file(name, data)
    return device


def run(data: bytes) -> None:
    """Drive a device."""
    with GuestMemory(ram_ranges(MEMORY_SIZE)) as memory:
        _drive(Input(data), memory)


def _drive(given: Input, memory: GuestMemory) -> None:
    device = _device(memory)
    for _ in range(STEPS_MAX):
        if given.is_over:
            break
        match given.number(1) % 6:
            case 0:
                size = given.choice((1, 2, 4, 8))
                value = device.read(given.number(1) % (SIZE - size + 1), size)
                assert 0 <= value < 1 << 8 * size
            case 1:
                size = given.choice((1, 2, 4, 8))
                device.write(given.number(1) % (SIZE - size + 1), size, given.number(size))
            case 2:
                device.write(Register.SELECTOR, 2, given.number(1))
            case 3:
                _dma(device, memory, given)
            case 4:
                again = _device(memory)
                again.restore(device.save())
                assert again.save() == device.save()
                assert again.read(Register.DATA, 1) == device.read(Register.DATA, 1)
            case _:
                at = given.number(2) % (MEMORY_SIZE - 256)
                piece = given.piece(given.number(1))
                memory.write(at, piece)


def _dma(device: FwCfg, memory: GuestMemory, given: Input) -> None:
    """Have a request in RAM done, and check what changed in RAM."""
    control = given.number(1) | given.number(1) << 16
    length = given.number(4 if given.number(1) == 255 else 2)
    target = given.number(8) if given.number(1) == 255 else given.number(2)
    request = control.to_bytes(4, "big") + length.to_bytes(4, "big") + target.to_bytes(8, "big")
    memory.write(_REQUEST_AT, request)
    before = memory.read(0, MEMORY_SIZE)
    device.write(Register.DMA_ADDRESS_HIGH, 4, 0)
    device.write(Register.DMA_ADDRESS_LOW, 4, int.from_bytes(_REQUEST_AT.to_bytes(4, "little")))
    after = bytearray(memory.read(0, MEMORY_SIZE))
    result = int.from_bytes(after[_REQUEST_AT : _REQUEST_AT + 4])
    assert result in {0, Control.ERROR}
    is_inside = target + length <= MEMORY_SIZE
    is_read = bool(control & Control.READ)
    assert bool(result) == (not is_inside if is_read else bool(control & Control.WRITE))
    after[_REQUEST_AT : _REQUEST_AT + 4] = before[_REQUEST_AT : _REQUEST_AT + 4]
    if is_read and is_inside:
        after[target : target + length] = before[target : target + length]
        after[_REQUEST_AT : _REQUEST_AT + 4] = before[_REQUEST_AT : _REQUEST_AT + 4]
    assert after == before, "RAM has changed elsewhere"


def seeds() -> list[bytes]:
    """Return the reads and requests of firmware."""
    select_read = bytes([2, Key.FILE_DIR, 0, 0, 1, 0, 2, 1])
    dma = bytes([3, Control.SELECT | Control.READ, Key.FILE_DIR, 0, 0, 2, 0, 0, 0x20])
    skip = bytes([3, Control.SKIP, 0, 0, 9, 0, 0, 0, 0]) + bytes([3, Control.WRITE, 0, 0, 4, 0, 0])
    far = bytes([3, Control.READ, 0, 255]) + b"\xff" * 4 + bytes([255]) + b"\xff" * 8
    return [select_read, dma, dma + skip + far + bytes([4]), bytes([1, 2, 4]) + b"\x00\x00\x01\x00"]
