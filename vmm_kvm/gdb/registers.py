"""The registers of a vCPU as GDB numbers them, and the description of them that it reads.

Source: "Debugging with GDB", appendix G.4 (standard target features, i386); the order of the
first two features is fixed there. Segment bases and control registers are features of their own.
"""

import ctypes
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from vmm_kvm.kvm import abi
from vmm_kvm.kvm.vcpu import Vcpu

_T = TypeVar("_T")

_REGS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
_SEGMENTS = ["cs", "ss", "ds", "es", "fs", "gs"]
_CONTROL = ["cr0", "cr2", "cr3", "cr4", "cr8", "efer"]
_FPU = ["fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"]
# Their offsets in the legacy region of XSAVE: Intel SDM vol. 1 §13.4.1, table 10-2.
_TAGS = 4
_FPU_NUMBERS = {
    "fctrl": (0, 2),
    "fstat": (2, 2),
    "fop": (6, 2),
    "fioff": (8, 4),
    "fiseg": (12, 2),
    "fooff": (16, 4),
    "foseg": (20, 2),
}
_FPU_PLACES = {
    "mxcsr": 24,
    **{f"st{index}": 32 + 16 * index for index in range(8)},
    **{f"xmm{index}": 160 + 16 * index for index in range(16)},
}
_IN_USE = 512
_X87_AND_SSE = 3
_ST_SIZE = 10
_XMM_SIZE = 16
_STACK_SIZE = 8
_EMPTY, _VALID = 3, 0


class Register(NamedTuple):
    """A register by its number: its place in the tables of a description."""

    name: str
    size: int
    """Bytes; little-endian, as all values here."""
    kind: str
    """GDB's name of its type."""


CORE = (
    *(Register(name, 8, "data_ptr" if name in {"rbp", "rsp"} else "int64") for name in _REGS),
    Register("rip", 8, "code_ptr"),
    Register("eflags", 4, "i386_eflags"),
    *(Register(name, 4, "int32") for name in _SEGMENTS),
    *(Register(f"st{index}", _ST_SIZE, "i387_ext") for index in range(8)),
    *(Register(name, 4, "int") for name in _FPU),
)
SSE = (
    *(Register(f"xmm{index}", _XMM_SIZE, "vec128") for index in range(16)),
    Register("mxcsr", 4, "i386_mxcsr"),
)
BASES = (Register("fs_base", 8, "int64"), Register("gs_base", 8, "int64"))
CONTROL = tuple(Register(name, 8, "int64") for name in _CONTROL)

REGISTERS = (*CORE, *SSE, *BASES, *CONTROL)
SIZE = sum(register.size for register in REGISTERS)
"""Bytes of all of them."""

_EFLAGS_BITS = (
    *(("CF", 0), ("", 1), ("PF", 2), ("AF", 4), ("ZF", 6), ("SF", 7), ("TF", 8), ("IF", 9)),
    *(("DF", 10), ("OF", 11), ("NT", 14), ("RF", 16), ("VM", 17), ("AC", 18), ("VIF", 19)),
    *(("VIP", 20), ("ID", 21)),
)
_MXCSR_BITS = (
    *(("IE", 0), ("DE", 1), ("ZE", 2), ("OE", 3), ("UE", 4), ("PE", 5), ("DAZ", 6), ("IM", 7)),
    *(("DM", 8), ("ZM", 9), ("OM", 10), ("UM", 11), ("PM", 12), ("FZ", 15)),
)
_VECTORS = (
    *(("v4_float", "ieee_single", 4), ("v2_double", "ieee_double", 2), ("v16_int8", "int8", 16)),
    *(("v8_int16", "int16", 8), ("v4_int32", "int32", 4), ("v2_int64", "int64", 2)),
)


def description() -> bytes:
    """Return the target's description, XML, that tells GDB all of this."""
    lines = [
        '<?xml version="1.0"?>',
        '<!DOCTYPE target SYSTEM "gdb-target.dtd">',
        "<target>",
        "<architecture>i386:x86-64</architecture>",
        *_feature("org.gnu.gdb.i386.core", CORE, _flags("i386_eflags", _EFLAGS_BITS)),
        *_feature("org.gnu.gdb.i386.sse", SSE, (*_vectors(), *_flags("i386_mxcsr", _MXCSR_BITS))),
        *_feature("org.gnu.gdb.i386.segments", BASES),
        *_feature("vmm.control", CONTROL),
        "</target>",
    ]
    return "\n".join(lines).encode()


def _feature(
    name: str, registers: tuple[Register, ...], types: tuple[str, ...] = ()
) -> tuple[str, ...]:
    return (
        f'<feature name="{name}">',
        *types,
        *(f'<reg name="{r.name}" bitsize="{8 * r.size}" type="{r.kind}"/>' for r in registers),
        "</feature>",
    )


def _flags(name: str, bits: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    fields = (f'<field name="{bit}" start="{at}" end="{at}"/>' for bit, at in bits)
    return (f'<flags id="{name}" size="4">', *fields, "</flags>")


def _vectors() -> tuple[str, ...]:
    return (
        *(f'<vector id="{name}" type="{kind}" count="{n}"/>' for name, kind, n in _VECTORS),
        '<union id="vec128">',
        *(f'<field name="{name}" type="{name}"/>' for name, _, _ in _VECTORS),
        '<field name="uint128" type="uint128"/>',
        "</union>",
    )


# Values


class _State:
    """KVM's registers of a vCPU: read once when they are needed, and written back.

    x87 and SSE by XSAVE: what KVM_SET_FPU sets is lost where the guest has not used them yet.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._regs: abi.kvm_regs | None = None
        self._sregs: abi.kvm_sregs | None = None
        self._xsave: ctypes.Structure | None = None

    @property
    def regs(self) -> abi.kvm_regs:
        self._regs = _or_else(self._regs, self._vcpu.get_regs)
        return self._regs

    @property
    def sregs(self) -> abi.kvm_sregs:
        self._sregs = _or_else(self._sregs, self._vcpu.get_sregs)
        return self._sregs

    @property
    def fpu(self) -> memoryview:
        """The legacy region of XSAVE, and what of its header says which parts are in use."""
        self._xsave = _or_else(self._xsave, self._vcpu.get_xsave)
        return memoryview(self._xsave).cast("B")

    def write_back(self) -> None:
        if self._regs is not None:
            self._vcpu.set_regs(self._regs)
        if self._sregs is not None:
            self._vcpu.set_sregs(self._sregs)
        if self._xsave is not None:
            self.fpu[_IN_USE] |= _X87_AND_SSE
            self._vcpu.set_xsave(self._xsave)


def _or_else(known: _T | None, read: Callable[[], _T]) -> _T:
    return read() if known is None else known


def read_all(vcpu: Vcpu) -> bytes:
    """Return all registers of a vCPU that is not in the guest, in their order.

    Raises:
        KvmError: KVM refused.
    """
    state = _State(vcpu)
    return b"".join(_value(state, register) for register in REGISTERS)


def read_one(vcpu: Vcpu, number: int) -> bytes:
    """Return a register by its number, below `len(REGISTERS)`.

    Raises:
        KvmError: KVM refused.
    """
    return _value(_State(vcpu), REGISTERS[number])


def write_one(vcpu: Vcpu, number: int, value: bytes) -> None:
    """Set a register to `value`, which is of its size.

    Raises:
        KvmError: KVM or the processor does not take it.
    """
    state = _State(vcpu)
    _set(state, REGISTERS[number], value)
    state.write_back()


def write_all(vcpu: Vcpu, values: bytes) -> None:
    """Set all registers; `values` has `SIZE` bytes.

    Raises:
        KvmError: KVM or the processor does not take them.
    """
    state = _State(vcpu)
    at = 0
    for register in REGISTERS:
        _set(state, register, values[at : at + register.size])
        at += register.size
    state.write_back()


def _value(state: _State, register: Register) -> bytes:
    name = register.name
    if at := _FPU_PLACES.get(name):
        return bytes(state.fpu[at : at + register.size])
    return _number(state, name).to_bytes(register.size, "little")


def _number(state: _State, name: str) -> int:
    if name == "ftag":
        return _full_tags(state.fpu[_TAGS])
    if name in _FPU:
        at, size = _FPU_NUMBERS[name]
        return int.from_bytes(state.fpu[at : at + size], "little")
    if name in _SEGMENTS:
        return int(getattr(state.sregs, name).selector)
    if name in _CONTROL:
        return int(getattr(state.sregs, name))
    if name.endswith("_base"):
        return int(getattr(state.sregs, name[:2]).base)
    if name == "eflags":
        return int(state.regs.rflags) & 0xFFFF_FFFF
    return int(getattr(state.regs, name))


def _full_tags(tags: int) -> int:
    """Return two bits a register, where `tags` has one that is set for a register in use."""
    return sum(
        (_VALID if tags >> index & 1 else _EMPTY) << 2 * index for index in range(_STACK_SIZE)
    )


def _set(state: _State, register: Register, value: bytes) -> None:
    name = register.name
    number = int.from_bytes(value, "little")
    if at := _FPU_PLACES.get(name):
        state.fpu[at : at + register.size] = value
    elif name == "ftag":
        used = (number >> 2 * index & 3 != _EMPTY for index in range(_STACK_SIZE))
        state.fpu[_TAGS] = sum(is_used << index for index, is_used in enumerate(used))
    elif name in _FPU:
        at, size = _FPU_NUMBERS[name]
        state.fpu[at : at + size] = value[:size]
    elif name in _SEGMENTS:
        getattr(state.sregs, name).selector = number & 0xFFFF
    elif name in _CONTROL:
        setattr(state.sregs, name, number)
    elif name.endswith("_base"):
        getattr(state.sregs, name[:2]).base = number
    elif name == "eflags":
        state.regs.rflags = number
    else:
        setattr(state.regs, name, number)
