"""A session of GDB with a machine: the meaning of each packet, and its answer.

Threads are vCPUs: thread n is vCPU n - 1. All-stop: when one vCPU stops, all do. A packet that is
not known is answered by an empty one, as the protocol wants.

Source: "Debugging with GDB", appendix E.
"""

from collections.abc import Callable

from vmm_kvm.errors import KvmError
from vmm_kvm.gdb import registers
from vmm_kvm.gdb.debugger import Action, Breakpoint, DebugError, Debugger, Kind, Stop
from vmm_kvm.gdb.packets import PACKET_MAX

_OK = b"OK"
_ERROR = b"E01"
_SIGINT, _SIGTRAP = 2, 5
_FEATURES = (
    b"PacketSize=%x;qXfer:features:read+;swbreak+;hwbreak+;vContSupported+;QStartNoAckMode+"
    % PACKET_MAX
)
_MOST_MEMORY = (PACKET_MAX - 16) // 2
_WATCHES = {Kind.WRITE: b"watch", Kind.ACCESS: b"awatch"}


class Session:
    """One debugger's conversation; on the event loop's thread."""

    def __init__(self, debugger: Debugger, on_kill: Callable[[], None]) -> None:
        """Begin; the machine is stopped. `on_kill` ends the VM, when the debugger asks."""
        self._debugger = debugger
        self._on_kill = on_kill
        self._vcpu = 0
        """The thread of requests for registers and memory."""
        self._continued = -1
        """The thread of `c` and `s`; all for -1."""
        self._last = Stop(0, is_asked=True)
        self.needs_acknowledgements = True
        self.is_over = False

    def stopped(self, stop: Stop) -> bytes:
        """Return the packet with the reason of the machine's stop."""
        self._last = stop
        self._vcpu = stop.vcpu
        signal = _SIGINT if stop.is_asked else _SIGTRAP
        text = b"T%02xthread:%x;" % (signal, stop.vcpu + 1)
        if stop.breakpoint is None:
            return text
        kind = stop.breakpoint.kind
        if kind in _WATCHES:
            return text + b"%s:%x;" % (_WATCHES[kind], stop.breakpoint.address)
        return text + (b"swbreak:;" if kind is Kind.SOFTWARE else b"hwbreak:;")

    def handle(self, packet: bytes) -> bytes | None:
        """Obey a packet; return the answer, None if it comes with the next stop."""
        try:
            return self._handle(packet)
        except (DebugError, KvmError, ValueError):  # also what makes no sense
            return _ERROR

    def _handle(self, packet: bytes) -> bytes | None:
        command, rest = packet[:1], packet[1:]
        match command:
            case b"?":
                return self.stopped(self._last)
            case b"g":
                return registers.read_all(self._debugger.vcpu(self._vcpu)).hex().encode()
            case b"G":
                return self._write_all(rest)
            case b"p":
                return self._read_register(rest)
            case b"P":
                return self._write_register(rest)
            case b"m":
                return self._read_memory(rest)
            case b"M" | b"X":
                return self._write_memory(rest, is_hex=command == b"M")
            case b"Z" | b"z":
                return self._breakpoint(rest, is_inserted=command == b"Z")
            case b"H":
                return self._choose(rest)
            case b"T":
                return _OK if 0 <= _thread(rest) < self._debugger.vcpus else _ERROR
            case b"c" | b"s" | b"C" | b"S":
                self._go_on_as(Action.RUN if command in {b"c", b"C"} else Action.STEP)
                return None
            case b"v":
                return self._many_letters(rest)
            case b"q" | b"Q":
                return self._query(packet)
            case b"D":
                self._debugger.detach()
                self.is_over = True
                return _OK
            case b"k":
                self.is_over = True
                self._on_kill()
                return None
            case _:
                return b""

    def _many_letters(self, rest: bytes) -> bytes | None:
        if rest == b"Cont?":
            return b"vCont;c;C;s;S"
        if rest.startswith(b"Cont;"):
            self._go_on(rest[len(b"Cont;") :])
            return None
        if rest.startswith(b"Kill"):
            self.is_over = True
            self._on_kill()
            return _OK
        return b""

    def _query(self, packet: bytes) -> bytes:
        name, _, value = packet.partition(b":")
        if packet == b"QStartNoAckMode":
            self.needs_acknowledgements = False
            return _OK
        if name == b"qSupported":
            return _FEATURES
        if packet.startswith(b"qXfer:features:read:target.xml:"):
            return _part(registers.description(), value.rpartition(b":")[2])
        if packet == b"qfThreadInfo":
            return b"m" + b",".join(b"%x" % (i + 1) for i in range(self._debugger.vcpus))
        if packet == b"qsThreadInfo":
            return b"l"
        if packet == b"qC":
            return b"QC%x" % (self._vcpu + 1)
        if name == b"qAttached":
            return b"1"
        if packet.startswith(b"qThreadExtraInfo,"):
            index = _thread(packet.partition(b",")[2])
            return f"vcpu{index}".encode().hex().encode()
        return b""

    # Registers and memory

    def _read_register(self, rest: bytes) -> bytes:
        number = int(rest, 16)
        if not 0 <= number < len(registers.REGISTERS):
            return _ERROR
        return registers.read_one(self._debugger.vcpu(self._vcpu), number).hex().encode()

    def _write_register(self, rest: bytes) -> bytes:
        number, _, text = rest.partition(b"=")
        value, index = bytes.fromhex(text.decode("ascii")), int(number, 16)
        if not 0 <= index < len(registers.REGISTERS):
            return _ERROR
        if len(value) != registers.REGISTERS[index].size:
            return _ERROR
        registers.write_one(self._debugger.vcpu(self._vcpu), index, value)
        return _OK

    def _write_all(self, rest: bytes) -> bytes:
        values = bytes.fromhex(rest.decode("ascii"))
        if len(values) != registers.SIZE:
            return _ERROR
        registers.write_all(self._debugger.vcpu(self._vcpu), values)
        return _OK

    def _read_memory(self, rest: bytes) -> bytes:
        address, size = _range(rest)
        data = self._debugger.read(self._vcpu, address, min(size, _MOST_MEMORY))
        return data.hex().encode() if data or not size else _ERROR

    def _write_memory(self, rest: bytes, *, is_hex: bool) -> bytes:
        place, _, data = rest.partition(b":")
        address, size = _range(place)
        if is_hex:
            data = bytes.fromhex(data.decode("ascii"))
        if len(data) != size:
            return _ERROR
        self._debugger.write(self._vcpu, address, data)
        return _OK

    def _breakpoint(self, rest: bytes, *, is_inserted: bool) -> bytes:
        kind, address, size = rest.partition(b";")[0].split(b",")
        if kind not in {b"0", b"1", b"2", b"4"}:
            return b""  # the processor has none that watches for reads alone
        breakpoint_ = Breakpoint(Kind(int(kind)), int(address, 16), int(size, 16))
        if is_inserted:
            self._debugger.insert(self._vcpu, breakpoint_)
        else:
            self._debugger.remove(breakpoint_)
        return _OK

    # Threads and running

    def _choose(self, rest: bytes) -> bytes:
        index = _thread(rest[1:])
        if index >= self._debugger.vcpus:
            return _ERROR
        if rest[:1] == b"c":
            self._continued = index
        elif index >= 0:
            self._vcpu = index
        return _OK

    def _go_on_as(self, action: Action) -> None:
        if self._continued < 0 and action is Action.RUN:
            self._debugger.go_on(dict.fromkeys(range(self._debugger.vcpus), action))
        else:
            self._debugger.go_on({max(self._continued, 0): action})

    def _go_on(self, text: bytes) -> None:
        """Read `action[:thread]` after `action[:thread]`; the first that fits a vCPU is its."""
        actions: dict[int, Action] = {}
        for item in text.split(b";"):
            name, _, thread = item.partition(b":")
            if name[:1] not in {b"c", b"C", b"s", b"S"}:
                raise ValueError(item)
            action = Action.RUN if name[:1] in {b"c", b"C"} else Action.STEP
            index = _thread(thread) if thread else -1
            for vcpu in range(self._debugger.vcpus) if index < 0 else (index,):
                actions.setdefault(vcpu, action)
        if max(actions) >= self._debugger.vcpus:
            raise ValueError(text)
        self._debugger.go_on(actions)


def _thread(text: bytes) -> int:
    """Return the index of a thread's vCPU; -1 for all, 0 for any."""
    number = int(text, 16)
    return -1 if number < 0 else max(number - 1, 0)


def _range(text: bytes) -> tuple[int, int]:
    address, size = text.split(b",")
    start, length = int(address, 16), int(size, 16)
    if start < 0 or length < 0:
        raise ValueError(text)
    return start, length


def _part(data: bytes, text: bytes) -> bytes:
    offset, size = _range(text)
    part = data[offset : offset + min(size, PACKET_MAX // 2)]
    return (b"m" if offset + len(part) < len(data) else b"l") + part
