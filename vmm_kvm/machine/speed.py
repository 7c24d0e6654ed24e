"""How fast guests run here: time a loop, in hardware or emulated."""

import ctypes
import mmap
import time

from vmm_kvm import primitives
from vmm_kvm.arch.x86.registers import Registers, SegmentRegister
from vmm_kvm.bits import PAGE_SIZE
from vmm_kvm.errors import VmmError
from vmm_kvm.kvm.exits import Hlt
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.primitives import Vmm
from vmm_kvm.vm_params import CreateParams, MemoryRange

_LOOP = bytes.fromhex(
    "66b9 00000000"  # mov $count, %ecx
    "6649"  #      1: dec %ecx
    "75fc"  #         jnz 1b
    "f4"  #           hlt
)
_CODE_ADDRESS = 0x1000
_COUNT_OFFSET = 2
_INSTRUCTIONS_PER_ROUND = 2
_FIRST_ROUNDS = 20_000
_ENOUGH_S = 0.02
_MAX_ROUNDS = 50_000_000


def guest_speed(kvm: Kvm) -> float:
    """Return how many instructions a second a guest executes in kernel mode.

    Takes some ten milliseconds. The loop grows until it takes long enough to time.

    Raises:
        KvmError: no VM can be made.
        VmmError: the loop did not end in HLT.
    """
    rounds = _FIRST_ROUNDS
    while True:
        seconds = _time_loop(kvm, rounds)
        if seconds >= _ENOUGH_S or rounds >= _MAX_ROUNDS:
            return rounds * _INSTRUCTIONS_PER_ROUND / seconds
        rounds *= 10


def _time_loop(kvm: Kvm, rounds: int) -> float:
    ram = mmap.mmap(-1, 2 * PAGE_SIZE)
    code = bytearray(_LOOP)
    code[_COUNT_OFFSET : _COUNT_OFFSET + 4] = rounds.to_bytes(4, "little")
    ram[_CODE_ADDRESS : _CODE_ADDRESS + len(code)] = bytes(code)
    hva = ctypes.addressof(ctypes.c_char.from_buffer(ram))
    with Vmm(kvm) as vmm:
        vm_id = primitives.create(
            vmm, CreateParams(ranges=[MemoryRange(0, hva, len(ram))], name="speed")
        )
        registers = primitives.read_registers(vmm, vm_id, 0)
        primitives.reset_vcpu(vmm, vm_id, 0, _at(registers, _CODE_ADDRESS))
        start = time.perf_counter()
        reason = primitives.run(vmm, vm_id, 0).exit
        seconds = time.perf_counter() - start
        if not isinstance(reason, Hlt):
            raise VmmError(f"self-test loop: ended in {type(reason).__name__}, not in HLT")
    return seconds


def _at(registers: Registers, address: int) -> Registers:
    """Return the registers of a vCPU after reset, but about to run `address` in real mode."""
    code = SegmentRegister(0, 0, 0xFFFF, 0x9B)
    return registers._replace(
        gprs={**(registers.gprs or {}), "rip": address},
        segments={**(registers.segments or {}), "cs": code},
    )
