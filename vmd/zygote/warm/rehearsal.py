"""A VM process's whole life, played in the process that VM processes are forked from.

The guest is firmware of a few hundred instructions: it probes every device as a driver would, waits
for a byte at its serial port, and ends the machine. Meanwhile the rehearsal pauses it, asks for its
statistics, captures it, and attaches to its console. Then it plays a clone of it.
"""

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Self

from vmd.shared.pty import open_pty
from vmd.wire.blank import JoinCgroup
from vmd.wire.capture import CaptureVm, VmCaptured
from vmd.wire.channel import Channel, ChannelClosedError, channel_pair
from vmd.wire.internal import (
    VM_AND_VMM,
    VMM_AND_VM,
    AskStatistics,
    AttachConsole,
    Begin,
    EndReason,
    LookAtTerminal,
    PauseVm,
    UnpauseVm,
    VmEnding,
    VmmToVm,
    VmReport,
    VmSpec,
    VmStarted,
)
from vmd.wire.messages import CONSOLE_INPUT
from vmd.wire.transfers import ReceivedSpec
from vmd.zygote.warm.gathering import Live, Recorder, gather
from vmd.zygote.warm.packing import fill_holes
from vmm_kvm.arch.x86 import layout
from vmm_kvm.bits import MIB
from vmm_kvm.kvm.vcpu import install_kick_signal
from vmm_kvm.memfd import make_constant

BeVm = Callable[[Channel[VmReport, VmmToVm]], None]
"""Runs a VM's process from its first message to its end; owns the channel."""

_PLAYS = 8
_MEMORY = 2 * MIB
_ROM_SIZE = 4096
_RESET_AT = 0xFF0
_NAME = "rehearsal"
_ITSELF = 1 << 31
_SERIAL_LINE_STATUS = 5
_SERIAL_REGISTERS = 7
_CLOCK_REGISTERS = 16
# Pairs of register and value: interrupts on and off, no FIFOs, 115200 8N1, modem lines.
_SERIAL_SETUP = ((1, 2), (1, 0), (2, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (4, 0xB), (1, 0))
# An alarm each second, the rate of periodic interrupts, 24 hours; and no alarm any more.
_CLOCK_SETUP = ((1, 0xFF), (3, 0xFF), (5, 0xFF), (0xA, 0x26), (0xB, 0x62), (0xB, 2))


_SPEC = VmSpec(
    id=0,
    name=_NAME,
    memory=_MEMORY,
    cpus=1,
    tty=0,
    ring=1,
    boot=2,
    boot_path=_NAME,
    is_template=True,
)
_CLONE_SPEC = VmSpec(
    id=0,
    name=_NAME,
    memory=_MEMORY,
    cpus=1,
    tty=0,
    ring=1,
    boot=None,
    boot_path=_NAME,
    received=ReceivedSpec(stream=2, manifest="", stays_paused=False, memory=3, is_copy=True),
)
_CAPTURED = 2


class RehearsalError(Exception):
    """No VM can be rehearsed; the message is one line."""


class Rehearsal:
    """The resources of every play; a context manager that owns them."""

    def __init__(self) -> None:
        """Open a pty whose slave side has been opened and closed once.

        Raises:
            OSError: the host has no terminals or descriptors left.
        """
        with ExitStack() as stack:
            self._pty = open_pty(_NAME, os.getuid(), None)
            stack.callback(self._pty.close)
            self._firmware = make_constant(_NAME, (_rom(),))
            stack.callback(os.close, self._firmware)
            self._cgroup = os.memfd_create(_NAME, os.MFD_CLOEXEC)
            """In place of a control group's file: what is written stays here."""
            stack.callback(os.close, self._cgroup)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def play_often(self, be_vm: BeVm) -> None:
        """Play until the code of a VM's process is fully specialised.

        The interpreter specialises code that has run a few times.
        """
        install_kick_signal()
        self._play(be_vm, _PLAYS)
        fill_holes()
        self._play_afresh(be_vm)

    def play_and_gather(self, be_vm: BeVm, live: Live, *, writes_tuples: bool) -> None:
        """Play as `play_often` does, and gather the code that runs; see `gathering`.

        `live` is the life of a rehearsed VM process.
        """
        install_kick_signal()
        self.play(be_vm)  # code that runs only the first time is of no interest
        with Recorder() as recorder:
            self.play(be_vm)
            recorder.follow(live)
        recorder.add(vars(threading.Thread).values())  # run before a thread is profiled
        self._play(be_vm, _PLAYS)
        fill_holes()
        gather(recorder, writes_tuples=writes_tuples)
        self._play(be_vm, _PLAYS)
        self._play_afresh(be_vm)

    def _play_afresh(self, be_vm: BeVm) -> None:
        # The attribute cache keeps names, and several share a slot, so their names would be written
        # to.
        clear = getattr(sys, "_clear_internal_caches", sys._clear_type_cache)  # noqa: SLF001 - documented
        clear()
        self.play(be_vm)

    def _play(self, be_vm: BeVm, times: int) -> None:
        for _ in range(times):
            self.play(be_vm)

    def play(self, be_vm: BeVm) -> None:
        """Let `be_vm` run the process of a VM that ends soon, and then that of its clone.

        Raises:
            RehearsalError: a VM cannot be made.
        """
        captured = self._play_one(be_vm, _SPEC, (self._firmware,))
        try:
            if len(captured) == _CAPTURED:  # else clones are made without
                os.lseek(captured[0], 0, os.SEEK_SET)
                self._play_one(be_vm, _CLONE_SPEC, captured)
        finally:
            for fd in captured:
                os.close(fd)

    def _play_one(self, be_vm: BeVm, spec: VmSpec, files: Sequence[int]) -> list[int]:
        """Let `be_vm` run one process; returns its handed-over state for clones."""
        here, there = channel_pair(VMM_AND_VM, VM_AND_VMM)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with here, ours:
            fds = list(map(os.dup, (*self._pty[1:], *files)))
            here.send(JoinCgroup(number=1), [os.dup(self._cgroup)])
            here.send(Begin(spec=spec, places=tuple(range(len(fds))), verbosity=0), fds)
            for command in (PauseVm(), UnpauseVm(), AskStatistics(), LookAtTerminal()):
                here.send(command)
            if spec.is_template:
                here.send(CaptureVm())
            ours.send(CONSOLE_INPUT + b"!")
            here.send(AttachConsole(), [theirs.detach()])
            be_vm(there)
            return self._check(here)

    @staticmethod
    def _check(here: Channel[VmmToVm, VmReport]) -> list[int]:
        """Raise an error unless all reports show that the guest has run.

        Returns the descriptors of a VM that was captured.
        """
        started = False
        captured: list[int] = []
        try:
            while True:
                received = here.receive()
                match received.message:
                    case VmStarted():
                        started = True
                    case VmCaptured():
                        captured += received.fds.take_all()
                    case VmEnding(reason=EndReason.FAILED, message=message):
                        raise RehearsalError(message)
        except ChannelClosedError:
            if not started:
                raise RehearsalError("the guest has not run") from None
        return captured


def _rom() -> bytes:
    code = b"".join(_code())
    rom = bytearray(code.ljust(_ROM_SIZE, b"\xff"))
    # A near jump from the reset vector to the start of the image, within a segment of 64 KiB.
    rom[_RESET_AT] = 0xE9
    distance = -(_RESET_AT + 3)
    rom[_RESET_AT + 1 : _RESET_AT + 3] = distance.to_bytes(2, "little", signed=True)
    return bytes(rom)


def _code() -> Iterator[bytes]:
    """Yield the guest, instruction by instruction, for real mode."""
    for register in range(1, _SERIAL_REGISTERS):  # the first would take the byte that is typed
        yield _in(layout.PORT_COM1 + register, 1)
    for register, value in _SERIAL_SETUP:
        yield _out(layout.PORT_COM1 + register, value, 1)
    for register in range(_CLOCK_REGISTERS):
        yield _out(layout.PORT_RTC, register, 1)
        yield _in(layout.PORT_RTC + 1, 1)
    for register, value in _CLOCK_SETUP:
        yield _out(layout.PORT_RTC, register, 1)
        yield _out(layout.PORT_RTC + 1, value, 1)
    for key in (0, 1, 5, 0x19):  # signature, id, processors, directory
        yield _out(layout.PORT_FW_CFG, key, 2)
        yield from [_in(layout.PORT_FW_CFG + 1, 1)] * 4
    for slot in range(4):
        for register in range(0, 0x40, 4):
            yield _out(layout.PORT_PCI_CONFIG, _ITSELF | slot << 11 | register, 4)
            yield _in(layout.PORT_PCI_CONFIG + 4, 4)
    for port in (layout.PORT_PM1A_EVENT, layout.PORT_PM1A_EVENT + 2, layout.PORT_PM1A_CONTROL):
        yield _in(port, 2)
        yield _out(port, 0, 2)
    yield _in(layout.PORT_PM_TIMER, 4)
    for character in b"rehearsal\r\n":
        yield _in(layout.PORT_COM1 + _SERIAL_LINE_STATUS, 1)
        yield _out(layout.PORT_COM1, character, 1)
    wait = _in(layout.PORT_COM1 + _SERIAL_LINE_STATUS, 1) + b"\xa8\x01"  # test al, 1
    yield wait + b"\x74" + (-len(wait) - 2).to_bytes(1, "little", signed=True)  # jz wait
    yield _in(layout.PORT_COM1, 1)
    yield _out(layout.PORT_DEBUG_EXIT, 0, 1)
    yield b"\xf4"  # hlt


def _in(port: int, size: int) -> bytes:
    return _port(port) + {1: b"\xec", 2: b"\xed", 4: b"\x66\xed"}[size]


def _out(port: int, value: int, size: int) -> bytes:
    load = {1: b"\xb0", 2: b"\xb8", 4: b"\x66\xb8"}[size] + value.to_bytes(size, "little")
    return _port(port) + load + {1: b"\xee", 2: b"\xef", 4: b"\x66\xef"}[size]


def _port(port: int) -> bytes:
    return b"\xba" + port.to_bytes(2, "little")  # mov dx, port
