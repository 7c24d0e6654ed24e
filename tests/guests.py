"""Tiny guests: machine code as bytes, one assembler line each, and a VM to run them in.

All start in real mode at CODE with every segment at 0 and interrupts off, on one vCPU with 64 KiB
of RAM from address 0; addresses above are MMIO. They report through PORT or MMIO, and end in HLT,
which is an exit if the VM has no irqchip.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vmm_kvm.arch.x86.entry import CR0_ET, REAL_DATA, REAL_TASK, Entry, Segment
from vmm_kvm.arch.x86.entry_state import load_entry
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import Vcpu
from vmm_kvm.kvm.vm import Vm

CODE = 0x1000
STACK = 0x8000
PORT = 0xF4
MMIO = 0xA_0000
RAM_SIZE = 0x1_0000
NMI_HANDLER = 0x2000
INTERRUPT_HANDLER = 0x2100
INTERRUPT_VECTOR = 0x20

REAL_CODE = Segment(0, 0, 0xFFFF, 11)


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "little")


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


HALT = bytes.fromhex("f4")  # hlt
SPIN = bytes.fromhex("ebfe")  # jmp .
NOPS = bytes.fromhex("90909090f4")  # nop; nop; nop; nop; hlt

ENABLE_X2APIC = b"".join(
    (
        bytes.fromhex("66b91b000000"),  # mov $0x1b, %ecx
        bytes.fromhex("0f32"),  # rdmsr
        bytes.fromhex("660d000c0000"),  # or $0xc00, %eax
        bytes.fromhex("0f30"),  # wrmsr
        bytes.fromhex("66b90f080000"),  # mov $0x80f, %ecx
        bytes.fromhex("6631d2"),  # xor %edx, %edx
        bytes.fromhex("66b8ff010000"),  # mov $0x1ff, %eax
        bytes.fromhex("0f30"),  # wrmsr
    )
)

TRIPLE_FAULT = b"".join(
    (
        bytes.fromhex("0f011e"),  # lidt empty
        _u16(CODE + 7),
        bytes.fromhex("0f0b"),  # ud2
        bytes(6),  # empty: limit 0, base 0
    )
)

WRITE_PORT = b"".join(
    (
        bytes.fromhex("b05a"),  # mov $0x5a, %al
        bytes.fromhex("e6f4"),  # out %al, $PORT
        bytes.fromhex("b83412"),  # mov $0x1234, %ax
        bytes.fromhex("e7f4"),  # out %ax, $PORT
        bytes.fromhex("66b878563412"),  # mov $0x12345678, %eax
        bytes.fromhex("66e7f4"),  # out %eax, $PORT
        bytes.fromhex("f4"),  # hlt
    )
)

READ_PORT = b"".join(
    (
        bytes.fromhex("e4f4"),  # in $PORT, %al
        bytes.fromhex("88c3"),  # mov %al, %bl
        bytes.fromhex("66e5f4"),  # in $PORT, %eax
        bytes.fromhex("f4"),  # hlt
    )
)

STRING_IO = b"".join(
    (
        bytes.fromhex("be0030"),  # mov $0x3000, %si
        bytes.fromhex("b90400"),  # mov $4, %cx
        bytes.fromhex("baf400"),  # mov $PORT, %dx
        bytes.fromhex("fc"),  # cld
        bytes.fromhex("f36e"),  # rep outsb
        bytes.fromhex("bf0040"),  # mov $0x4000, %di
        bytes.fromhex("b90400"),  # mov $4, %cx
        bytes.fromhex("f36c"),  # rep insb
        bytes.fromhex("f4"),  # hlt
    )
)
STRING_SOURCE = 0x3000
STRING_TARGET = 0x4000

ACCESS_MMIO = b"".join(
    (
        bytes.fromhex("b800a0"),  # mov $0xa000, %ax
        bytes.fromhex("8ed8"),  # mov %ax, %ds
        bytes.fromhex("66c7061000efbeadde"),  # movl $0xdeadbeef, 0x10
        bytes.fromhex("c606140077"),  # movb $0x77, 0x14
        bytes.fromhex("66a12000"),  # mov 0x20, %eax
        bytes.fromhex("f4"),  # hlt
    )
)

STORE = b"".join(
    (
        bytes.fromhex("c606005001"),  # movb $1, 0x5000
        bytes.fromhex("c606007001"),  # movb $1, 0x7000
        bytes.fromhex("f4"),  # hlt
    )
)
STORED_PAGES = (0x5, 0x7)

WAIT_FOR_INTERRUPT = b"".join(
    (
        bytes.fromhex("fb"),  # sti
        bytes.fromhex("f4"),  # 1: hlt
        bytes.fromhex("ebfd"),  # jmp 1b
    )
)

NMI_REPORT = b"".join(
    (
        bytes.fromhex("b002"),  # mov $2, %al
        bytes.fromhex("e6f4"),  # out %al, $PORT
        bytes.fromhex("cf"),  # iret
    )
)

INTERRUPT_REPORT = b"".join(
    (
        bytes.fromhex("b020"),  # mov $0x20, %al
        bytes.fromhex("e6f4"),  # out %al, $PORT
        bytes.fromhex("e620"),  # out %al, $0x20: end of interrupt, where there is a PIC
        bytes.fromhex("cf"),  # iret
    )
)

SET_UP_PIC = b"".join(
    (
        bytes.fromhex("b011"),  # mov $0x11, %al
        bytes.fromhex("e620"),  # out %al, $0x20: edge-triggered, cascaded, ICW4 follows
        bytes.fromhex("b020"),  # mov $INTERRUPT_VECTOR, %al
        bytes.fromhex("e621"),  # out %al, $0x21: IRQ 0 is vector 0x20
        bytes.fromhex("b004"),  # mov $4, %al
        bytes.fromhex("e621"),  # out %al, $0x21: the slave is at input 2
        bytes.fromhex("b001"),  # mov $1, %al
        bytes.fromhex("e621"),  # out %al, $0x21: 8086 mode
        bytes.fromhex("b0fe"),  # mov $0xfe, %al
        bytes.fromhex("e621"),  # out %al, $0x21: only IRQ 0
        bytes.fromhex("e6f4"),  # out %al, $PORT: ready
    )
)
"""Makes the master PIC deliver GSI 0 as INTERRUPT_VECTOR; put it before another guest's code."""


def out_loop(count: int) -> bytes:
    """Return a guest that writes a byte to PORT `count` times, then halts."""
    return b"".join(
        (
            bytes.fromhex("66b9") + _u32(count),  # mov $count, %ecx
            bytes.fromhex("e6f4"),  # 1: out %al, $PORT
            bytes.fromhex("6649"),  # dec %ecx
            bytes.fromhex("75fa"),  # jnz 1b
            bytes.fromhex("f4"),  # hlt
        )
    )


def out_countdown(count: int) -> bytes:
    """Return a guest that writes `count` to 1 to PORT, the low byte of each; then halts."""
    return b"".join(
        (
            bytes.fromhex("66b9") + _u32(count),  # mov $count, %ecx
            bytes.fromhex("88c8"),  # 1: mov %cl, %al
            bytes.fromhex("e6f4"),  # out %al, $PORT
            bytes.fromhex("6649"),  # dec %ecx
            bytes.fromhex("75f8"),  # jnz 1b
            bytes.fromhex("f4"),  # hlt
        )
    )


def printing(count: int) -> bytes:
    """Return code that prints `count` to 1 on COM1, the low byte of each.

    It reads LSR before each; further code must follow it.
    """
    return b"".join(
        (
            bytes.fromhex("b9") + _u16(count),  # mov $count, %cx
            bytes.fromhex("bafd03"),  # 1: mov $0x3fd, %dx
            bytes.fromhex("ec"),  # in %dx, %al
            bytes.fromhex("a820"),  # test $0x20, %al
            bytes.fromhex("74f8"),  # jz 1b
            bytes.fromhex("88c8"),  # mov %cl, %al
            bytes.fromhex("baf803"),  # mov $0x3f8, %dx
            bytes.fromhex("ee"),  # out %al, %dx
            bytes.fromhex("e2f0"),  # loop 1b
        )
    )


# Sends 0x5a to itself on COM1, writes LSR (high) and RBR (low) to PORT, as a word, and halts.
LOOP_BACK = b"".join(
    (
        bytes.fromhex("bafc03"),  # mov $0x3fc, %dx
        bytes.fromhex("b010"),  # mov $0x10, %al
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("baf803"),  # mov $0x3f8, %dx
        bytes.fromhex("b05a"),  # mov $0x5a, %al
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("bafd03"),  # mov $0x3fd, %dx
        bytes.fromhex("ec"),  # in %dx, %al
        bytes.fromhex("88c4"),  # mov %al, %ah
        bytes.fromhex("baf803"),  # mov $0x3f8, %dx
        bytes.fromhex("ec"),  # in %dx, %al
        bytes.fromhex("baf400"),  # mov $PORT, %dx
        bytes.fromhex("ef"),  # out %ax, %dx
        bytes.fromhex("f4"),  # hlt
    )
)


# Begins in real mode; the table's descriptor lies at 0x100 of the code segment. All data are flat.
REACH_ALL = b"".join(
    (
        bytes.fromhex("fa"),  # cli
        bytes.fromhex("2e660f01160001"),  # lgdtl %cs:0x100
        bytes.fromhex("0f20c0"),  # mov %cr0, %eax
        bytes.fromhex("6683c801"),  # or $1, %eax
        bytes.fromhex("0f22c0"),  # mov %eax, %cr0
        bytes.fromhex("b81000"),  # mov $0x10, %ax
        bytes.fromhex("8ed8"),  # mov %ax, %ds
    )
)


def hanging(slot: int) -> bytes:
    """Return a guest that enables the watchdog in a PCI slot, for two seconds, and halts."""
    function = 0x8000_0000 | slot << 11
    return b"".join(
        (
            bytes.fromhex("66b8") + _u32(function | 0x60),  # mov $config, %eax
            bytes.fromhex("baf80c"),  # mov $0xcf8, %dx
            bytes.fromhex("66ef"),  # out %eax, %dx
            bytes.fromhex("bafc0c"),  # mov $0xcfc, %dx
            bytes.fromhex("b80700"),  # mov $7, %ax: short ticks, no interrupt
            bytes.fromhex("ef"),  # out %ax, %dx
            bytes.fromhex("66b8") + _u32(function | 0x68),  # mov $control, %eax
            bytes.fromhex("baf80c"),  # mov $0xcf8, %dx
            bytes.fromhex("66ef"),  # out %eax, %dx
            bytes.fromhex("bafc0c"),  # mov $0xcfc, %dx
            bytes.fromhex("b002"),  # mov $2, %al: enabled
            bytes.fromhex("ee"),  # out %al, %dx
            bytes.fromhex("f4"),  # hlt
        )
    )


def hanging_once(slot: int) -> bytes:
    """Return a guest that hangs like `hanging`, unless the watchdog has timed out before.

    Then it ends with 42 as its debug exit. The watchdog's registers are at 0xd0000000, which it
    reaches with 32-bit addresses in real mode. For `firmware`.
    """
    function = 0x8000_0000 | slot << 11
    configure = b"".join(
        bytes.fromhex("66b8")  # mov $register, %eax
        + _u32(function | register)
        + bytes.fromhex("baf80c66ef")  # mov $0xcf8, %dx; out %eax, %dx
        + bytes.fromhex("66b8")  # mov $value, %eax
        + _u32(value)
        + bytes.fromhex("bafc0c66ef")  # mov $0xcfc, %dx; out %eax, %dx
        for register, value in ((0x10, 0xD000_0000), (0x04, 2))  # BAR 0, command: memory
    )
    code = b"".join(
        (
            configure,
            bytes.fromhex("2e0f0116"),  # lgdt %cs:gdt
            _u16(_GDT_AT),
            bytes.fromhex("0f20c00c010f22c0"),  # mov %cr0, %eax; or $1, %al; mov %eax, %cr0
            bytes.fromhex("bb08008edb"),  # mov $8, %bx; mov %bx, %ds
            bytes.fromhex("24fe0f22c0"),  # and $0xfe, %al; mov %eax, %cr0
            bytes.fromhex("6766a10c0000d0"),  # mov 0xd000000c, %eax
            bytes.fromhex("f6c402"),  # test $2, %ah
            bytes.fromhex("7406"),  # jz 1f
            bytes.fromhex("b02ae6f4"),  # mov $42, %al; out %al, $0xf4
            bytes.fromhex("ebfe"),  # jmp .
            hanging(slot),  # 1:
        )
    ).ljust(_GDT_AT, b"\0")
    table = _GDT_AT + 8
    pointer = _u16(15) + _u32(0xF_0000 + table)
    return code + pointer.ljust(8, b"\0") + bytes(8) + bytes.fromhex("ffff00000092cf00")


_GDT_AT = 0x100


def firmware(code: bytes) -> bytes:
    """Return a flat firmware image that runs position-independent `code`."""
    image = bytearray(64 << 10)
    image[: len(code)] = code
    image[-16:-11] = bytes.fromhex("ea000000f0")  # ljmp $0xf000, $0
    return bytes(image)


def in_loop(count: int) -> bytes:
    """Return a guest that reads a byte from PORT `count` times, then halts."""
    return b"".join(
        (
            bytes.fromhex("66b9") + _u32(count),  # mov $count, %ecx
            bytes.fromhex("e4f4"),  # 1: in $PORT, %al
            bytes.fromhex("6649"),  # dec %ecx
            bytes.fromhex("75fa"),  # jnz 1b
            bytes.fromhex("f4"),  # hlt
        )
    )


def mmio_loop(count: int) -> bytes:
    """Return a guest that writes a byte to MMIO `count` times, then halts."""
    return b"".join(
        (
            bytes.fromhex("b800a0"),  # mov $0xa000, %ax
            bytes.fromhex("8ed8"),  # mov %ax, %ds
            bytes.fromhex("66b9") + _u32(count),  # mov $count, %ecx
            bytes.fromhex("a20000"),  # 1: mov %al, 0
            bytes.fromhex("6649"),  # dec %ecx
            bytes.fromhex("75f9"),  # jnz 1b
            bytes.fromhex("f4"),  # hlt
        )
    )


@dataclass(frozen=True, slots=True)
class Guest:
    """A VM with one vCPU and its RAM, ready to run."""

    kvm: Kvm
    vm: Vm
    vcpu: Vcpu
    ram: mmap.mmap
    hva: int

    def put(self, address: int, data: bytes) -> None:
        """Copy `data` into RAM."""
        self.ram[address : address + len(data)] = data

    def set_vector(self, vector: int, handler: int) -> None:
        """Let real-mode interrupt `vector` go to `handler`."""
        self.put(4 * vector, _u16(handler) + _u16(0))


def start(vcpu: Vcpu, address: int = CODE) -> None:
    """Let `vcpu` begin at `address` in real mode, with flat segments and a stack."""
    load_entry(
        vcpu,
        Entry(
            rip=address,
            cr0=CR0_ET,
            code=REAL_CODE,
            data=REAL_DATA,
            task=REAL_TASK,
            idt_limit=0x3FF,
            registers={"rsp": STACK},
        ),
    )


@contextmanager
def guest(code: bytes, *, irqchip: bool = False, log_dirty: bool = False) -> Iterator[Guest]:
    """Make a VM whose only vCPU will run `code`, with an irqchip and a PIT or without."""
    ram = mmap.mmap(-1, RAM_SIZE)
    hva = ctypes.addressof(ctypes.c_char.from_buffer(ram))
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.set_memory_region(0, 0, RAM_SIZE, hva, log_dirty=log_dirty)
        if irqchip:
            vm.create_irqchip()
        with vm.create_vcpu(0) as vcpu:
            start(vcpu)
            made = Guest(kvm, vm, vcpu, ram, hva)
            made.put(CODE, code)
            yield made
