"""A guest that counts, for saving and restoring: it detects lost interrupts and wrong accesses.

The first processor reads port 0x92 again and again, also 64 times with one instruction, checks the
values, and halts after every eighth round. Each interrupt of its APIC timer sets the next TSC
deadline; and whenever all other processors have counted the last IPI, the handler sends them
another one. They halt between IPIs. So the counters advance only as long as no timer, no IPI and no
half-done access is lost. A wrong value ends the run with `BAD` at isa-debug-exit.

Real mode, all segments at 0, x2APIC. The counters have 32 bits.
"""

from __future__ import annotations

import json
import os
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.guests import ENABLE_X2APIC
from vmm_kvm.arch.x86.image import open_image
from vmm_kvm.arch.x86.kvm_state import ClockPolicy
from vmm_kvm.bits import MIB
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import install_kick_signal
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.machine import Machine
from vmm_kvm.machine.spec import MachineSpec, Outcome
from vmm_kvm.machine.state import MachineState, restore, save
from vmm_kvm.primitives import Vmm

BAD = 0x77
DEADLINE_S = 60
RAM_SIZE = 4 * MIB
DEADLINE_CYCLES = 2_000_000
_COUNTERS = struct.Struct("<IIII")
_AT = 0x3000
_AP_PAGE = 0x1000
_AP_JUMP = bytes.fromhex("ea230100f0")  # ljmp $0xf000, $ap
_RESET = bytes.fromhex("ea000000f0")  # ljmp $0xf000, $_start
_SIZE = 64 << 10

_CODE = b"".join(
    (
        bytes.fromhex("fa"),  # _start: cli
        bytes.fromhex("31c0"),  # xor %ax, %ax
        bytes.fromhex("8ed8"),  # mov %ax, %ds
        bytes.fromhex("8ec0"),  # mov %ax, %es
        bytes.fromhex("8ed0"),  # mov %ax, %ss
        bytes.fromhex("bc0070"),  # mov $0x7000, %sp
        bytes.fromhex("c7068000c400"),  # movw $tick, 0x80
        bytes.fromhex("c706820000f0"),  # movw $0xf000, 0x82
        bytes.fromhex("c70684000d01"),  # movw $ipi, 0x84
        bytes.fromhex("c706860000f0"),  # movw $0xf000, 0x86
        ENABLE_X2APIC,
        bytes.fromhex("b05f"),  # mov $0x5f, %al
        bytes.fromhex("e670"),  # out %al, $0x70
        bytes.fromhex("e471"),  # in $0x71, %al
        bytes.fromhex("a21030"),  # mov %al, 0x3010
        bytes.fromhex("66b930080000"),  # mov $0x830, %ecx
        bytes.fromhex("66b800450c00"),  # mov $0xc4500, %eax
        bytes.fromhex("0f30"),  # wrmsr
        bytes.fromhex("66b8f1460c00"),  # mov $0xc46f1, %eax
        bytes.fromhex("0f30"),  # wrmsr
        bytes.fromhex("66a10430"),  # aps: mov 0x3004, %eax
        bytes.fromhex("6639061030"),  # cmp %eax, 0x3010
        bytes.fromhex("75f5"),  # jne aps
        bytes.fromhex("66b932080000"),  # mov $0x832, %ecx
        bytes.fromhex("66b820000400"),  # mov $0x40020, %eax
        bytes.fromhex("0f30"),  # wrmsr
        bytes.fromhex("e82f00"),  # call arm
        bytes.fromhex("fb"),  # sti
        bytes.fromhex("66ff060030"),  # main: incl 0x3000
        bytes.fromhex("ba9200"),  # mov $0x92, %dx
        bytes.fromhex("ec"),  # in %dx, %al
        bytes.fromhex("3c02"),  # cmp $2, %al
        bytes.fromhex("751d"),  # jne bad
        bytes.fromhex("bf0040"),  # mov $0x4000, %di
        bytes.fromhex("b94000"),  # mov $64, %cx
        bytes.fromhex("fc"),  # cld
        bytes.fromhex("f36c"),  # rep insb
        bytes.fromhex("bf0040"),  # mov $0x4000, %di
        bytes.fromhex("b94000"),  # mov $64, %cx
        bytes.fromhex("f3ae"),  # repe scasb
        bytes.fromhex("750a"),  # jne bad
        bytes.fromhex("f606003007"),  # testb $7, 0x3000
        bytes.fromhex("75d9"),  # jnz main
        bytes.fromhex("f4"),  # hlt
        bytes.fromhex("ebd6"),  # jmp main
        bytes.fromhex("b077"),  # bad: mov $0x77, %al
        bytes.fromhex("e6f4"),  # out %al, $0xf4
        bytes.fromhex("0f31"),  # arm: rdtsc
        bytes.fromhex("660580841e00"),  # add $2000000, %eax
        bytes.fromhex("6683d200"),  # adc $0, %edx
        bytes.fromhex("66b9e0060000"),  # mov $0x6e0, %ecx
        bytes.fromhex("0f30"),  # wrmsr
        bytes.fromhex("c3"),  # ret
        bytes.fromhex("6660"),  # tick: pushal
        bytes.fromhex("66ff060830"),  # incl 0x3008
        bytes.fromhex("66a10c30"),  # mov 0x300c, %eax
        bytes.fromhex("8b0e1030"),  # mov 0x3010, %cx
        bytes.fromhex("bb0431"),  # mov $0x3104, %bx
        bytes.fromhex("e30b"),  # acked: jcxz send
        bytes.fromhex("663907"),  # cmp %eax, (%bx)
        bytes.fromhex("751c"),  # jne again
        bytes.fromhex("83c304"),  # add $4, %bx
        bytes.fromhex("49"),  # dec %cx
        bytes.fromhex("ebf3"),  # jmp acked
        bytes.fromhex("66ff060c30"),  # send: incl 0x300c
        bytes.fromhex("66b930080000"),  # mov $0x830, %ecx
        bytes.fromhex("6631d2"),  # xor %edx, %edx
        bytes.fromhex("66b821000c00"),  # mov $0xc0021, %eax
        bytes.fromhex("0f30"),  # wrmsr
        bytes.fromhex("e8b3ff"),  # again: call arm
        bytes.fromhex("66b90b080000"),  # eoi: mov $0x80b, %ecx
        bytes.fromhex("6631c0"),  # xor %eax, %eax
        bytes.fromhex("6631d2"),  # xor %edx, %edx
        bytes.fromhex("0f30"),  # wrmsr
        bytes.fromhex("6661"),  # popal
        bytes.fromhex("cf"),  # iret
        bytes.fromhex("6660"),  # ipi: pushal
        bytes.fromhex("66b902080000"),  # mov $0x802, %ecx
        bytes.fromhex("0f32"),  # rdmsr
        bytes.fromhex("c1e002"),  # shl $2, %ax
        bytes.fromhex("89c3"),  # mov %ax, %bx
        bytes.fromhex("66ff870031"),  # incl 0x3100(%bx)
        bytes.fromhex("ebd9"),  # jmp eoi
        bytes.fromhex("fa"),  # ap: cli
        bytes.fromhex("31c0"),  # xor %ax, %ax
        bytes.fromhex("8ed8"),  # mov %ax, %ds
        bytes.fromhex("8ed0"),  # mov %ax, %ss
        ENABLE_X2APIC,
        bytes.fromhex("66b902080000"),  # mov $0x802, %ecx
        bytes.fromhex("0f32"),  # rdmsr
        bytes.fromhex("c1e008"),  # shl $8, %ax
        bytes.fromhex("050050"),  # add $0x5000, %ax
        bytes.fromhex("89c4"),  # mov %ax, %sp
        bytes.fromhex("66f0ff060430"),  # lock incl 0x3004
        bytes.fromhex("fb"),  # idle: sti
        bytes.fromhex("f4"),  # hlt
        bytes.fromhex("ebfc"),  # jmp idle
    )
)
_AP = 0x123
assert _CODE[_AP] == 0xFA  # the cli at the label of _AP_JUMP


def counting_guest() -> bytes:
    """Return the guest as a flat firmware image."""
    image = bytearray(_SIZE)
    image[: len(_CODE)] = _CODE
    image[_AP_PAGE : _AP_PAGE + len(_AP_JUMP)] = _AP_JUMP
    image[-16 : -16 + len(_RESET)] = _RESET
    return bytes(image)


class Counters(NamedTuple):
    """The guest's counters."""

    rounds: int
    """Rounds of the first processor."""
    others: int
    """Processors that have started."""
    ticks: int
    """Timer interrupts."""
    sent: int
    """IPIs that all others had counted when the next one went out."""

    @classmethod
    def of(cls, machine: Machine) -> Counters:
        """Read a machine's counters."""
        return cls(*_COUNTERS.unpack(machine.memory.read(_AT, _COUNTERS.size)))

    def is_past(self, other: Counters) -> bool:
        """Tell whether every counter has advanced since `other`."""
        return (
            self.rounds > other.rounds
            and self.ticks > other.ticks + 1
            and self.sent > other.sent + 1
        )


class Stand:
    """Makes machines of one specification in this process."""

    def __init__(self, image: Path, cpus: int) -> None:
        self.spec = MachineSpec(
            image=open_image(str(image)), memory_size=RAM_SIZE, cpus=cpus, devices=()
        )
        self.outcomes: list[Outcome] = []

    @contextmanager
    def machine(self, *, is_restored: bool = False) -> Iterator[Machine]:
        """Make a machine, with a table and a loop of its own."""
        install_kick_signal()
        with (
            Kvm() as kvm,
            Vmm(kvm) as vmm,
            EventLoop() as loop,
            Machine(
                self.spec,
                vmm,
                loop,
                transmit=lambda _: None,
                on_receive_room=lambda: None,
                on_outcome=self.outcomes.append,
                is_restored=is_restored,
            ) as machine,
        ):
            yield machine

    def wait(self, machine: Machine, condition: Callable[[Counters], bool]) -> Counters:
        """Wait until the guest's counters meet a condition; the guest must not end meanwhile."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition(counters := Counters.of(machine)):
            assert not self.outcomes, self.outcomes
            assert time.monotonic() < deadline, counters
            time.sleep(0.002)
        return counters


def take(machine: Machine) -> tuple[MachineState, bytes]:
    """Pause a machine and return its state and memory."""
    machine.pause()
    return save(machine), machine.memory.read(0, RAM_SIZE)


def give(
    machine: Machine, saved: tuple[MachineState, bytes], policy: ClockPolicy = ClockPolicy.FROZEN
) -> None:
    """Let a new machine continue from there."""
    state, memory = saved
    machine.memory.write(0, memory)
    restore(machine, state._replace(parts=json.loads(json.dumps(state.parts))), policy)
    machine.start()
    machine.resume()


def in_new_process(act: Callable[[], None]) -> int:
    """Call `act` in a new process; return the exit status, 0 if nothing was raised."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        except BaseException:  # noqa: BLE001 - the child says it by its status
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
