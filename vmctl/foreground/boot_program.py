"""A program of system calls, one after the other: the first process of a guest without a shell.

What mounts a root and executes a program there needs no branch and no library, so it is made here,
as an ELF file of one segment. A call that fails changes nothing: the next one is made.

Source: the System V ABI for x86-64 (A.2.1, calls of the kernel); ELF-64
"""

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

_BASE = 0x400000
_ELF: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_HEADERS = _ELF.size + _SEGMENT.size
_IDENT = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
_EXECUTABLE, _X86_64, _LOAD, _READ_WRITE_EXECUTE = 2, 62, 1, 7
_PAGE = 0x1000
_EACH_CALL = 5 + 6 * 6 + 2  # the number, six arguments, the call itself
_TO_NUMBER = b"\xb8"  # mov eax, imm32
# mov edi, imm32, and so on for rsi, rdx, r10, r8 and r9; each fills six bytes.
_TO_ARGUMENTS = (b"\xbf", b"\xbe", b"\xba", b"\x41\xba", b"\x41\xb8", b"\x41\xb9")
_RESULT_TO_FIRST = b"\x89\xc7"  # mov edi, eax
_SYSCALL = b"\x0f\x05"
_NOP = b"\x90"
_MASK32 = 0xFFFF_FFFF


class Result(NamedTuple):
    """What the call before has returned; for a first argument."""


RESULT = Result()
Argument = int | bytes | tuple[bytes, ...] | Result
"""A number, the address of a string or of an array of strings, which a null pointer ends."""


class Call(NamedTuple):
    """A system call, by its number."""

    number: int
    arguments: tuple[Argument, ...] = ()


def assemble(calls: Sequence[Call]) -> bytes:
    """Return a static program for x86-64 that makes `calls`; the last one should not return."""
    code, data = bytearray(), bytearray()
    start = _BASE + _HEADERS + len(calls) * _EACH_CALL

    def place(item: bytes) -> int:
        data.extend(bytes(-len(data) % 8))
        address = start + len(data)
        data.extend(item)
        return address

    for call in calls:
        piece = bytearray()
        for position, argument in enumerate(call.arguments):
            match argument:
                case Result():
                    assert position == 0, "it is lost with the number"
                    piece += _padded(_RESULT_TO_FIRST, 6)
                    continue
                case int():
                    value = argument
                case bytes():
                    value = place(argument + b"\0")
                case _:
                    pointers = [place(item + b"\0") for item in argument]
                    value = place(struct.pack(f"<{len(pointers) + 1}Q", *pointers, 0))
            piece += _padded(_TO_ARGUMENTS[position] + struct.pack("<I", value & _MASK32), 6)
        piece += _TO_NUMBER + struct.pack("<I", call.number)
        code += _padded(bytes(piece), _EACH_CALL - len(_SYSCALL)) + _SYSCALL
    size = _HEADERS + len(code) + len(data)
    header = _ELF.pack(
        *(_IDENT, _EXECUTABLE, _X86_64, 1, _BASE + _HEADERS, _ELF.size, 0, 0),
        *(_ELF.size, _SEGMENT.size, 1, 0, 0, 0),
    )
    segment = _SEGMENT.pack(_LOAD, _READ_WRITE_EXECUTE, 0, _BASE, _BASE, size, size, _PAGE)
    return header + segment + bytes(code) + bytes(data)


def _padded(piece: bytes, size: int) -> bytes:
    return piece + _NOP * (size - len(piece))
