"""A debugger's operations on a machine: breakpoints, steps, memory, and running vCPUs.

Everything runs on the event loop's thread but `_hit`, which runs on a vCPU's. While the debugger
has stopped the machine no vCPU is in the guest; its devices and its clocks go on.

Breakpoints have the processor's four registers as long as there are some left: these change no
memory, outlive a reboot, and KVM knows them in code that it emulates. Software breakpoints without
one are INT3 instructions in guest memory, which are there only while the machine runs.

Source: KVM API §4.87 KVM_SET_GUEST_DEBUG; Intel SDM vol. 3 §18.2 (debug registers).
"""

import enum
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from vmm_kvm.bits import PAGE_SIZE
from vmm_kvm.errors import GuestMemoryError
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.exits import Debug
from vmm_kvm.kvm.vcpu import Vcpu
from vmm_kvm.machine.machine import Machine

_INT3 = 0xCC
_DB, _BP = 1, 3
_SLOTS = 4
_MOST = 1024  # breakpoints in memory: more than a person sets
_DR6_STEP = 1 << 14
_DR7_EXACT = 0x600
_LENGTHS = {1: 0, 2: 1, 4: 3, 8: 2}
_ADDRESS = (1 << 64) - 1


class Kind(enum.IntEnum):
    """Kinds of breakpoints, by the protocol's numbers."""

    SOFTWARE = 0
    HARDWARE = 1
    WRITE = 2
    READ = 3
    ACCESS = 4


_TYPES = {Kind.SOFTWARE: 0, Kind.HARDWARE: 0, Kind.WRITE: 1, Kind.ACCESS: 3}
_WATCHING = (Kind.WRITE, Kind.ACCESS)


class Breakpoint(NamedTuple):
    """A place, or bytes, that the debugger watches."""

    kind: Kind
    address: int
    """Linear."""
    size: int
    """Bytes that are watched; of no meaning for one that is software."""


class Stop(NamedTuple):
    """The reason for which the machine is stopped."""

    vcpu: int
    breakpoint: Breakpoint | None = None
    """None: a step, or the debugger asked."""
    is_asked: bool = False


class Action(enum.Enum):
    """A vCPU's action when the machine continues."""

    HOLD = enum.auto()
    STEP = enum.auto()
    RUN = enum.auto()


class DebugError(Exception):
    """The debugger asks for what cannot be done."""


class Debugger:
    """A debugger's hold on one machine, and on the one after a reboot.

    `post` has something called on the event loop's thread, from any thread; `on_stop` is called
    there when the machine has stopped by itself, and not for `stop`.
    """

    def __init__(
        self, post: Callable[[Callable[[], None]], None], on_stop: Callable[[Stop], None]
    ) -> None:
        """Hold nothing yet."""
        self._post = post
        self._on_stop = on_stop
        self._machine: Machine | None = None
        self._hardware: list[Breakpoint] = []
        self._software: dict[Breakpoint, int | None] = {}
        """With the guest-physical address, if it is in RAM."""
        self._slots: list[Breakpoint] = []
        """Those that have a register, in the registers' order."""
        self._patched: dict[int, tuple[int, int]] = {}
        """Linear addresses with an INT3: the guest-physical one, and the byte that was there."""
        self._planted: frozenset[int] = frozenset()
        """Those that had one when the machine last went on, also once it has stopped: another vCPU
        may have run into one just before."""
        self._armed: dict[int, tuple[int, tuple[int, ...]]] = {}
        """Of each vCPU, what KVM was told to watch."""
        self.is_stopped = False

    @property
    def vcpus(self) -> int:
        """How many vCPUs the machine has."""
        return self._held().spec.cpus

    def attach(self, machine: Machine) -> None:
        """Take a machine, of which no vCPU has run yet, or that runs.

        It takes the breakpoints of the one before that have a register; what was written into that
        one's memory is gone with it.
        """
        self._machine = machine
        self._patched.clear()
        self._planted = frozenset()
        self._software = dict.fromkeys(self._slots_of(Kind.SOFTWARE))
        machine.on_debug = self._hit
        if self._slots or self.is_stopped:
            machine.hold()
            self._arm({})
            if not self.is_stopped:
                machine.hold(())

    def detach(self) -> None:
        """Let the machine continue without a trace of the debugger; idempotent."""
        if self._machine is None:
            return
        self.stop()
        self._hardware.clear()
        self._software.clear()
        self._slots.clear()
        for vcpu in self._each():
            vcpu.set_guest_debug(0)
        self._machine.on_debug = None
        self.is_stopped = False
        self._machine.hold(())
        self._machine = None

    # Running

    def stop(self) -> None:
        """Bring every vCPU out; returns when they are."""
        self._held().hold()
        self.is_stopped = True
        self._restore_memory()

    def go_on(self, actions: Mapping[int, Action]) -> None:
        """Let the vCPUs do what `actions` says by their indices; the others are held.

        Raises:
            KvmError: KVM has no breakpoints, or cannot step.
        """
        self._arm(actions)
        self.is_stopped = False
        held = [i for i in range(self.vcpus) if actions.get(i, Action.HOLD) is Action.HOLD]
        self._held().hold(held)

    def _arm(self, actions: Mapping[int, Action]) -> None:
        software = sorted(self._software, key=lambda one: self._software[one] is not None)
        self._slots = [*self._hardware, *software][:_SLOTS]
        control = abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_USE_SW_BP
        registers: tuple[int, ...] = ()
        if self._slots:
            control |= abi.KVM_GUESTDBG_USE_HW_BP
            addresses = [watched.address for watched in self._slots]
            addresses += [0] * (_SLOTS - len(addresses))
            registers = (*addresses, 0, 0, 0, self._dr7())
        # A kernel that cannot keep interrupts away from a step (before 5.16) does not look.
        step = abi.KVM_GUESTDBG_SINGLESTEP | abi.KVM_GUESTDBG_BLOCKIRQ
        for vcpu in self._each():
            is_step = actions.get(vcpu.index) is Action.STEP
            self._armed[vcpu.index] = control | (step if is_step else 0), registers
            vcpu.set_guest_debug(*self._armed[vcpu.index])
        for one, gpa in self._software.items():
            if one not in self._slots and gpa is not None:
                self._patched[one.address] = gpa, self._held().memory.read(gpa, 1)[0]
                self._held().memory.write(gpa, bytes((_INT3,)))
        self._planted = frozenset(self._patched)

    def _slots_of(self, kind: Kind) -> list[Breakpoint]:
        return [one for one in self._slots if one.kind is kind]

    def _restore_memory(self) -> None:
        memory = self._held().memory
        for gpa, original in self._patched.values():
            # If the guest has written something else since, that stays.
            if memory.read(gpa, 1)[0] == _INT3:
                memory.write(gpa, bytes((original,)))
        self._patched.clear()

    def _dr7(self) -> int:
        bits = _DR7_EXACT
        for index, watched in enumerate(self._slots):
            bits |= 2 << 2 * index
            bits |= _TYPES[watched.kind] << 16 + 4 * index
            size = watched.size if watched.kind in _WATCHING else 1
            bits |= _LENGTHS[size] << 18 + 4 * index
        return bits

    def _hit(self, vcpu: Vcpu, exit_: Debug) -> None:
        """Stop the machine, or give the guest its own exception; on the vCPU's thread."""
        machine = self._machine
        if machine is None:  # it has been let go meanwhile
            return
        stop = self._why(vcpu, exit_)
        if stop is None:
            inject = abi.KVM_GUESTDBG_INJECT_BP
            if exit_.exception == _DB:
                inject = abi.KVM_GUESTDBG_INJECT_DB
                state = vcpu.get_debugregs()  # which KVM does not tell the guest's handler
                state.dr6 = exit_.dr6
                vcpu.set_debugregs(state)
            control, registers = self._armed[vcpu.index]  # which it would lose by being told less
            vcpu.set_guest_debug(control | inject, registers)
            return
        machine.hold(wait=False)
        self._post(lambda: self._arrived(machine, stop))

    def _why(self, vcpu: Vcpu, exit_: Debug) -> Stop | None:
        """Return why a vCPU has left the guest, None if that is an exception of the guest's own."""
        pc = exit_.pc & _ADDRESS
        if exit_.exception == _BP:
            if pc not in self._planted:
                return None
            return Stop(vcpu.index, Breakpoint(Kind.SOFTWARE, pc, 1))
        # The bits of other slots have no meaning: they may be set for what is not enabled.
        for index, watched in enumerate(self._slots):
            if exit_.dr6 >> index & 1:
                return Stop(vcpu.index, watched)
        control, _ = self._armed[vcpu.index]
        is_step = control & abi.KVM_GUESTDBG_SINGLESTEP and exit_.dr6 & _DR6_STEP
        return Stop(vcpu.index) if is_step else None

    def _arrived(self, machine: Machine, stop: Stop) -> None:
        if self._machine is not machine or self.is_stopped:
            return  # ended, or stopped by another vCPU: this one comes again
        self.stop()
        self._on_stop(stop)

    # Registers and memory, while it is stopped

    def vcpu(self, index: int) -> Vcpu:
        """Return a vCPU, to read and write its registers."""
        return self._held().vcpu(index)

    def read(self, index: int, address: int, size: int) -> bytes:
        """Return up to `size` bytes at a linear address, as vCPU `index` sees them.

        It ends where no RAM is.
        """
        data = bytearray()
        for gpa, length in self._places(index, address, size):
            try:
                data += self._held().memory.read(gpa, length)
            except GuestMemoryError:
                break
        return bytes(data)

    def write(self, index: int, address: int, data: bytes) -> None:
        """Write at a linear address, as vCPU `index` sees it.

        Raises:
            DebugError: it is no RAM; bytes before that are written.
        """
        done = 0
        for gpa, length in self._places(index, address, len(data)):
            try:
                self._held().memory.write(gpa, data[done : done + length])
            except GuestMemoryError as err:
                raise DebugError from err
            done += length
        if done < len(data):
            raise DebugError

    def _places(self, index: int, address: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield guest-physical places of linear bytes, page by page, to the first without one."""
        vcpu = self.vcpu(index)
        while size > 0:
            address &= _ADDRESS
            length = min(size, PAGE_SIZE - address % PAGE_SIZE)
            gpa = vcpu.translate(address)
            if gpa is None:
                return
            yield gpa, length
            address += length
            size -= length

    # Breakpoints

    def insert(self, index: int, breakpoint_: Breakpoint) -> None:
        """Insert a breakpoint, as vCPU `index` sees its address; again changes nothing.

        Raises:
            DebugError: there is no RAM, no room, or what is watched is no aligned number.
        """
        if breakpoint_ in self._hardware or breakpoint_ in self._software:
            return
        if breakpoint_.kind in _WATCHING and (
            breakpoint_.size not in _LENGTHS or breakpoint_.address % breakpoint_.size
        ):
            raise DebugError
        if breakpoint_.kind not in _TYPES:
            raise DebugError
        gpa = None
        if breakpoint_.kind is Kind.SOFTWARE:
            gpa = self._ram(index, breakpoint_.address)
        needed = sum(gpa is None for gpa in (*self._software.values(), gpa)) + len(self._hardware)
        if needed > _SLOTS or len(self._software) == _MOST:
            raise DebugError
        if breakpoint_.kind is Kind.SOFTWARE:
            self._software[breakpoint_] = gpa
        else:
            self._hardware.append(breakpoint_)

    def remove(self, breakpoint_: Breakpoint) -> None:
        """Remove a breakpoint; nothing happens if there is none."""
        self._software.pop(breakpoint_, None)
        if breakpoint_ in self._hardware:
            self._hardware.remove(breakpoint_)

    def _ram(self, index: int, address: int) -> int | None:
        """Return where in RAM a linear address is, None if it is nowhere."""
        for gpa, size in self._places(index, address, 1):
            if self._held().memory.contains(gpa, size):
                return gpa
        return None

    def _held(self) -> Machine:
        if self._machine is None:
            raise DebugError("no machine")
        return self._machine

    def _each(self) -> Iterator[Vcpu]:
        return (self.vcpu(index) for index in range(self.vcpus))
