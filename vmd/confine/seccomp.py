"""Allow-lists of system calls, compiled to the kernel's classic BPF; independent of VMs.

A filter is a table of `Allow`: a call, the reason for it, and optionally conditions on its
arguments. Any other call ends the whole process with SIGSYS, save those in `refused`, which return
an
error number instead: calls that libraries try and can do without.

Filters intersect: a process that is forked from a confined one, and confines itself again, can make
only the calls that both filters allow.

An argument can be the process's own number, which is filled in when the filter is installed. A
process that forks must not have only such an allowance: its filter binds its children as well.

A `Denial` is the opposite, for a process whose children need too much: the calls that it lists
fail.

Source: seccomp(2); Linux include/uapi/linux/{seccomp,filter,audit}.h
"""

import ctypes
import os
import struct
from collections.abc import Iterable, Sequence
from enum import Enum
from errno import EPERM
from functools import cache
from typing import NamedTuple

from vmd.confine.syscalls import SYSCALLS
from vmm_kvm.libc import LIBC

ACTION_ALLOW = 0x7FFF0000
ACTION_ERRNO = 0x00050000
ACTION_KILL_PROCESS = 0x80000000

_AUDIT_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000

# Instructions.
_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_GREATER_OR_EQUAL = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_JUMP_MAX = 255

# struct seccomp_data
_NUMBER_AT = 0
_ARCH_AT = 4
_ARGUMENTS_AT = 16

_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_INSTRUCTION = struct.Struct("<HBBI")  # struct sock_filter
_OPERAND = struct.Struct("<I")
_OPERAND_AT = 4


class OwnPid(Enum):
    """The number of the process that installs the filter."""

    PID = "pid"


class Argument(NamedTuple):
    """A condition on an argument: its low 32 bits, masked, equal `value`."""

    number: int
    """The argument's number, 0 to 5."""
    value: int | OwnPid
    mask: int = 0xFFFFFFFF


_Line = tuple[int, int, int, int | OwnPid]
"""An instruction: code, jump targets if a condition holds and if not, operand."""


class Allow(NamedTuple):
    """An allowance: the call, the reason, and conditions on arguments; all must hold."""

    name: str
    reason: str
    arguments: tuple[Argument, ...] = ()


class Refuse(NamedTuple):
    """A call that fails with an error number instead of ending the process, and why."""

    name: str
    errno: int
    reason: str


class Filter(NamedTuple):
    """The system calls of one kind of process."""

    allowed: tuple[Allow, ...]
    refused: tuple[Refuse, ...] = ()


class Denial(NamedTuple):
    """A call that fails with EPERM, in a filter that allows all others, and why."""

    name: str
    reason: str


class Program(NamedTuple):
    """A BPF program, an array of struct sock_filter."""

    code: bytes
    own_pid: tuple[int, ...] = ()
    """Offsets of 32-bit operands that are to be the number of the process."""


class _SockFprog(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


@cache
def compile_filter(table: Filter) -> Program:
    """Return the BPF program; it is made once for each table.

    Calls with conditions come first: they are the frequent ones, and the kernel itself caches which
    calls are always allowed.

    Raises:
        KeyError: a call that is not in `syscalls.SYSCALLS`.
    """
    by_number: dict[int, list[tuple[Argument, ...]]] = {}
    for allow in table.allowed:
        by_number.setdefault(SYSCALLS[allow.name], []).append(allow.arguments)
    refused = {
        number: one.errno
        for one in table.refused
        if (number := SYSCALLS[one.name]) not in by_number or all(by_number[number])
    }
    program = _prologue()
    for number, cases in sorted(by_number.items(), key=lambda item: not all(item[1])):
        if not all(cases):
            block = [_instruction(_RETURN, ACTION_ALLOW)]
        else:
            block = _cases(cases)
            # The call's number is no longer loaded, so a call that matches no case ends here.
            errno = refused.pop(number, None)
            block.append(_instruction(_RETURN, _action(errno)))
        program += _block(number, block)
    for number, errno in refused.items():
        program += _block(number, [_instruction(_RETURN, _action(errno))])
    program.append(_instruction(_RETURN, ACTION_KILL_PROCESS))
    return _assemble(program)


def compile_denials(denials: Iterable[Denial]) -> Program:
    """Return a BPF program that allows all but `denials`; another ABI's calls end the process."""
    program = _prologue()
    for denial in denials:
        refusal = _instruction(_RETURN, _action(EPERM))
        program += _block(SYSCALLS[denial.name], [refusal])
    program.append(_instruction(_RETURN, ACTION_ALLOW))
    return _assemble(program)


def _prologue() -> list[_Line]:
    """Return code that ends a process for a call by another ABI, and loads the call's number."""
    return [
        *_jump_equal(_AUDIT_ARCH_X86_64, load_at=_ARCH_AT),
        _instruction(_RETURN, ACTION_KILL_PROCESS),
        _instruction(_LOAD, _NUMBER_AT),
        (_JUMP_GREATER_OR_EQUAL, 0, 1, _X32_BIT),
        _instruction(_RETURN, ACTION_KILL_PROCESS),
    ]


def _assemble(lines: Sequence[_Line]) -> Program:
    own_pid = tuple(
        index * _INSTRUCTION.size + _OPERAND_AT
        for index, line in enumerate(lines)
        if isinstance(line[3], OwnPid)
    )
    code = b"".join(
        _INSTRUCTION.pack(*line[:3], 0 if isinstance(line[3], OwnPid) else line[3])
        for line in lines
    )
    return Program(code, own_pid)


def install(program: Program) -> None:
    """Confine every thread of this process to `program`, for ever, and gain no privileges again.

    Raises:
        OSError: the kernel has no filters, or refuses this one.
    """
    no_new_privileges()
    code = bytearray(program.code)
    for offset in program.own_pid:
        _OPERAND.pack_into(code, offset, os.getpid())
    fprog = _SockFprog(len(code) // _INSTRUCTION.size, bytes(code))
    if LIBC.syscall(SYSCALLS["seccomp"], _SECCOMP_SET_MODE_FILTER, 0, ctypes.byref(fprog)):
        errno = ctypes.get_errno()
        raise OSError(errno, f"seccomp: {os.strerror(errno)}")


def no_new_privileges() -> None:
    """Deny executed programs more privileges than this process has."""
    if LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl: {os.strerror(errno)}")


def _cases(cases: Iterable[tuple[Argument, ...]]) -> list[_Line]:
    block: list[_Line] = []
    for arguments in cases:
        tests = [
            (
                _instruction(_LOAD, _ARGUMENTS_AT + 8 * one.number),
                _instruction(_AND, one.mask),
                one.value,
            )
            for one in arguments
        ]
        left = 3 * len(tests) + 1  # with the return at the end
        for load, mask, value in tests:
            left -= 3
            block += [load, mask, (_JUMP_EQUAL, 0, left, value)]
        block.append(_instruction(_RETURN, ACTION_ALLOW))
    return block


def _block(number: int, block: list[_Line]) -> list[_Line]:
    assert len(block) <= _JUMP_MAX
    return [(_JUMP_EQUAL, 0, len(block), number), *block]


def _jump_equal(value: int, *, load_at: int) -> list[_Line]:
    """Load a word, and skip the next instruction if it is `value`."""
    return [_instruction(_LOAD, load_at), (_JUMP_EQUAL, 1, 0, value)]


def _instruction(code: int, operand: int) -> _Line:
    return code, 0, 0, operand


def _action(errno: int | None) -> int:
    return ACTION_KILL_PROCESS if errno is None else ACTION_ERRNO | errno
