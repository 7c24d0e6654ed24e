"""How fast guests run here: time a loop, in hardware or emulated."""

import ctypes
import mmap
import time

from vmm_kvm.bits import PAGE_SIZE
from vmm_kvm.errors import VmmError
from vmm_kvm.kvm.exits import Hlt
from vmm_kvm.kvm.system import Kvm

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
    with kvm.create_vm() as vm:
        vm.set_memory_region(0, 0, len(ram), hva)
        with vm.create_vcpu(0) as vcpu:
            sregs = vcpu.get_sregs()
            sregs.cs.base, sregs.cs.selector = 0, 0
            vcpu.set_sregs(sregs)
            regs = vcpu.get_regs()
            regs.rip, regs.rflags = _CODE_ADDRESS, 2
            vcpu.set_regs(regs)
            start = time.perf_counter()
            reason = vcpu.run()
            seconds = time.perf_counter() - start
            if not isinstance(reason, Hlt):
                raise VmmError(f"self-test loop: ended in {type(reason).__name__}, not in HLT")
    return seconds
