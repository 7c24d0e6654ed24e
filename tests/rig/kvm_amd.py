"""Protect the rig from a fault of QEMU: remove one function of its kernel's kvm-amd module.

QEMU's emulation of SVM aborts when a guest writes CR8 while KVM has an interrupt pending for it:
target/i386/tcg/system/misc_helper.c, helper_write_crN, calls `cpu_interrupt` without the required
lock (seen with 10.0 and 11.1). UEFI firmware writes CR8 at the end of each tick of its timer, when
the next tick may be due already.

At first KVM intercepts a vCPU's writes of CR8 (INTERCEPT_CR8_WRITE). Later KVM's
`svm_update_cr8_intercept` lets through writes that do not matter to KVM, to save their exits. A
return at the function's beginning keeps all intercepted. Guests see no difference.
"""

from __future__ import annotations

import struct

_FUNCTION = b"svm_update_cr8_intercept"
# Every function of the kernel begins with a landing pad for indirect branches (in 6.12) and a call
# for its tracer; our return follows them.
_LANDING_PAD = bytes.fromhex("f30f1efa")  # endbr64
_CALL, _CALL_SIZE, _RETURN = 0xE8, 5, 0xC3

# Source: Linux scripts/sign-file.c, the end of a signed module: the signature, its
# description, which ends with the signature's length, and this.
_SIGNED = b"~Module signature appended~\n"
_DESCRIPTION = struct.Struct(">8xI")

# Source: System V ABI, ELF-64: e_shoff, e_shentsize and e_shnum of the header; sh_type, sh_offset,
# sh_size and sh_link of a section; st_name, st_shndx and st_value of a symbol.
_HEADER = struct.Struct("<40xQ10xHH2x")
_SECTION = struct.Struct("<4xI16xQQI20x")
_SYMBOL = struct.Struct("<I2xHQ8x")
_MAGIC = b"\x7fELF\x02\x01"
_SHT_SYMTAB = 2


class ModuleError(Exception):
    """The module is not as expected; the text says what is missing."""


def with_cr8_intercepted(module: bytes) -> bytes:
    """Return the module without that function, and without its signature, now wrong.

    Raises:
        ModuleError: it is no module for x86-64, or has no such function.
    """
    changed = bytearray(_unsigned(module))
    start = _function_at(changed)
    if changed.startswith(_LANDING_PAD, start):
        start += len(_LANDING_PAD)
    if changed[start] != _CALL:
        raise ModuleError(f"{_FUNCTION.decode()}: begins with {changed[start]:#x}, not with a call")
    changed[start + _CALL_SIZE] = _RETURN
    return bytes(changed)


def _unsigned(module: bytes) -> bytes:
    if not module.endswith(_SIGNED):
        return module
    end = len(module) - len(_SIGNED)
    (size,) = _DESCRIPTION.unpack_from(module, end - _DESCRIPTION.size)
    return module[: end - _DESCRIPTION.size - size]


def _function_at(module: bytearray) -> int:
    """Return the offset of the function's first byte in the file."""
    if not module.startswith(_MAGIC):
        raise ModuleError("not a module for x86-64")
    table, entry_size, count = _HEADER.unpack_from(module)
    sections = [_SECTION.unpack_from(module, table + entry_size * i) for i in range(count)]
    for kind, offset, size, link in sections:
        if kind != _SHT_SYMTAB:
            continue
        _, names, _, _ = sections[link]
        for name, section, value in _SYMBOL.iter_unpack(module[offset : offset + size]):
            if module.startswith(_FUNCTION + b"\0", names + name):
                return int(sections[section][1] + value)
    raise ModuleError(f"no function {_FUNCTION.decode()}")
