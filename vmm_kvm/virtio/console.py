"""virtio-console: one port, hvc0, whose output costs one exit a buffer, not one a byte.

Flow is controlled in both directions: input waits outside until the guest has room for it, and
output stays in the guest's buffers while its reader is slow.

Locks: `_lock` guards the input and the size; nothing is called under it.

Source: virtio 1.2 §5.3
"""

import struct
import threading
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

from vmm_kvm.state import U16, U32, Length, Part, PartState
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.backlog import Backlog
from vmm_kvm.virtio.buffers import scatter, split
from vmm_kvm.virtio.chain import Chain
from vmm_kvm.virtio.device import Transport
from vmm_kvm.virtio.queue import Virtqueue

RECEIVE_QUEUE, TRANSMIT_QUEUE = 0, 1
QUEUE_SIZE = 128

_CONFIG = struct.Struct("<HHII")  # columns, rows, ports, emergency write
_EMERGENCY_AT = 8
_INPUT_MAX = 4096
_PIECE = 64 * 1024  # bytes of output handed on at once
_ROOM = 1 << 16  # columns and rows are 16 bits


class ConsoleSpec(NamedTuple):
    """A virtio console of a machine, hvc0, besides the serial port."""

    kind: Literal["console"] = "console"


class ConsoleState(PartState):
    """Everything that a guest can observe of a console, and pending data."""

    input: Annotated[bytes, Length(0, _INPUT_MAX)]
    """Output that waits for room."""
    sent: U32
    """Bytes of the oldest output chain that have been handed on."""
    size: tuple[U16, U16]
    """Columns and rows."""
    version: Literal[1] = 1


class VirtioConsole:
    """A console; a `virtio.device.Backend`.

    `transmit` takes output, on the device's thread or, for emergency output, on a vCPU's; it must
    not block. `on_receive_room` says that `receive` takes input again, on the device's thread.
    """

    __slots__ = (
        "_input",
        "_is_held",
        "_is_started",
        "_lock",
        "_offered",
        "_on_receive_room",
        "_output",
        "_sent",
        "_size",
        "_transmit",
        "_transport",
        "_written",
        "device_id",
        "features",
        "queue_sizes",
    )

    def __init__(
        self,
        transmit: Callable[[bytes], None],
        *,
        on_receive_room: Callable[[], None],
        size: tuple[int, int] = (80, 24),
    ) -> None:
        """Make a console of `size` columns and rows, each up to 65535."""
        self.device_id = abi.VIRTIO_ID_CONSOLE
        self.features = 1 << abi.VIRTIO_CONSOLE_F_SIZE | 1 << abi.VIRTIO_CONSOLE_F_EMERG_WRITE
        self.queue_sizes: tuple[int, ...] = (QUEUE_SIZE, QUEUE_SIZE)
        self._transmit = transmit
        self._on_receive_room = on_receive_room
        self._size = size
        self._transport: Transport | None = None
        self._lock = threading.Lock()
        self._input = bytearray()
        self._is_started = False
        self._is_held = False
        self._offered = Backlog()  # room for input
        self._written = Backlog()  # output
        # The oldest chain of them, and the rest of it, last buffer first.
        self._output: tuple[Chain, list[memoryview]] | None = None
        self._sent = 0  # bytes of it that have been handed on

    def attach(self, transport: Transport) -> None:
        """Remember `transport`, which arranges calls of `process`; before the guest runs."""
        self._transport = transport

    # The backend

    def config(self) -> bytes:
        """Return the configuration space. Source: virtio 1.2 §5.3.4."""
        return _CONFIG.pack(*self._size, 1, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take one byte of emergency output, which needs no driver and no queue."""
        if offset == _EMERGENCY_AT and data:
            self._transmit(data[:1])

    def start(self, features: int) -> None:  # noqa: ARG002 - none changes what is done
        """Begin; input is taken from now on."""
        with self._lock:
            self._is_started = True
        self._on_receive_room()

    def process(self, index: int, queue: Virtqueue) -> None:
        """Move as much input or output as both sides have room for."""
        if index == RECEIVE_QUEUE:
            self._fill(queue)
        else:
            self._drain(queue)

    def reset(self) -> None:
        """Forget input and output under way."""
        with self._lock:
            self._is_started = False
            self._input.clear()
        self._offered.clear()
        self._written.clear()
        self._output = None
        self._sent = 0

    def close(self) -> None:
        """Do nothing: it owns nothing."""

    def _fill(self, queue: Virtqueue) -> None:
        waiting = self._offered.collect(queue)
        with self._lock:
            data = bytes(self._input)
        at = 0
        while waiting and at < len(data):
            chain = waiting.popleft()
            count = scatter(chain.writable, data[at:])
            queue.push(chain, count)
            at += count
        if at:
            with self._lock:
                del self._input[:at]
            self._on_receive_room()

    def _drain(self, queue: Virtqueue) -> None:
        waiting = self._written.collect(queue)
        while waiting and not self._is_held:
            if self._output is None or self._output[0] is not waiting[0]:
                chain = waiting[0]
                self._output = chain, split(chain.readable, self._sent)[1][::-1]
            left = self._output[1]
            if not left:
                self._output = None
                self._sent = 0
                queue.push(waiting.popleft(), 0)
                continue
            buffer = left.pop()
            if len(buffer) > _PIECE:
                left.append(buffer[_PIECE:])
            piece = bytes(buffer[:_PIECE])
            self._sent += len(piece)
            self._transmit(piece)

    # Snapshots

    def parts(self, name: str) -> list[Part]:
        """Return itself."""
        return [Part(f"{name}/console", self)]

    def save(self) -> ConsoleState:
        """Return the state; output that was not handed on is in the queue."""
        with self._lock:
            return ConsoleState(input=bytes(self._input), sent=self._sent, size=self._size)

    def restore(self, state: ConsoleState) -> None:
        """Continue from a snapshot."""
        with self._lock:
            self._input[:] = state.input
        self._sent = state.sent
        self._size = state.size

    # The outside; any thread

    @property
    def is_started(self) -> bool:
        """Whether a driver is ready to take input."""
        return self._is_started

    def receive(self, data: bytes) -> int:
        """Offer input to the guest; returns how many bytes were taken, from the first.

        None before its driver is ready. After fewer than all were taken, `on_receive_room` says
        when to offer the rest.
        """
        with self._lock:
            count = min(len(data), _INPUT_MAX - len(self._input)) if self._is_started else 0
            self._input += data[:count]
        if count:
            self._notify(RECEIVE_QUEUE)
        return count

    def throttle(self, hold: bool) -> None:
        """Keep output in the guest's buffers while its reader is slow, or let it flow."""
        self._is_held = hold
        if not hold:
            self._notify(TRANSMIT_QUEUE)

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest how large its screen is; each up to 65535."""
        size = columns % _ROOM, rows % _ROOM
        if size != self._size:
            self._size = size
            if self._transport:
                self._transport.config_changed()

    def _notify(self, index: int) -> None:
        if self._transport:
            self._transport.notify(index)
