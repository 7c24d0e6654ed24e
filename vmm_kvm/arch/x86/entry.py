"""The state in which the first vCPU starts: what every boot path produces."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_NW = 1 << 29
CR0_CD = 1 << 30
CR0_PG = 1 << 31
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
RFLAGS_RESERVED = 1 << 1


class Segment(NamedTuple):
    """A segment register with its hidden part, as Intel SDM vol. 3 §3.4.3 describes it."""

    selector: int
    base: int
    limit: int
    """In bytes, inclusive."""
    type: int
    """The descriptor's four type bits."""
    s: int = 1
    """1 for code and data, 0 for system segments."""
    db: int = 0
    l: int = 0  # noqa: E741 - the manual's name of the bit
    g: int = 0
    present: int = 1
    dpl: int = 0


FLAT_CODE64 = Segment(0x08, 0, 0xFFFF_FFFF, 11, l=1, g=1)
FLAT_CODE32 = Segment(0x08, 0, 0xFFFF_FFFF, 11, db=1, g=1)
FLAT_DATA = Segment(0x10, 0, 0xFFFF_FFFF, 3, db=1, g=1)
TASK64 = Segment(0x18, 0, 0x67, 11, s=0)
REAL_DATA = Segment(0, 0, 0xFFFF, 3)
REAL_TASK = Segment(0, 0, 0xFFFF, 11, s=0)
RESET_CODE = Segment(0xF000, 0xFFFF_0000, 0xFFFF, 11)


class Entry(NamedTuple):
    """Registers of the boot vCPU at its first instruction; all others are zero."""

    rip: int
    cr0: int = CR0_PE | CR0_ET
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    rflags: int = RFLAGS_RESERVED
    code: Segment = FLAT_CODE32
    data: Segment = FLAT_DATA
    """For DS, ES, FS, GS and SS."""
    task: Segment = TASK64
    gdt_base: int = 0
    gdt_limit: int = 0
    idt_limit: int = 0
    registers: Mapping[str, int] = MappingProxyType({})
    """General registers by their KVM name: rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 to r15."""


RESET_VECTOR = Entry(
    rip=0xFFF0,
    cr0=CR0_ET | CR0_NW | CR0_CD,
    code=RESET_CODE,
    data=REAL_DATA,
    task=REAL_TASK,
    gdt_limit=0xFFFF,
    idt_limit=0xFFFF,
)
"""The processor's reset state, for firmware (Intel SDM vol. 3 table 10-1); CS based under 4 GiB."""
