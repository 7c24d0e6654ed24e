"""virtio-net: an Ethernet interface whose frames a port of the host sends and receives.

Frames go between the port and guest memory without a copy, where they fit into the first of the
driver's buffers or come in the driver's own; the rest of a large one is copied once. Checksums and
large segments stay as they are, if the port can have them so: the header in front of every frame
says what is left to do, and the port's kernel checks it.

A queue gets no more than its share of the thread: after `BUDGET` frames the others have their turn.

Source: virtio 1.2 §5.1
"""

import struct
from collections import deque
from collections.abc import Collection, Sequence
from itertools import islice
from typing import Protocol

from vmm_kvm.limits import MTU_DEFAULT
from vmm_kvm.log import Log
from vmm_kvm.net.ethernet import ADDRESS_SIZE, HEAD_SIZE, HEADER_SIZE, Filter, text
from vmm_kvm.scatter import total
from vmm_kvm.state import Part
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.backlog import Backlog
from vmm_kvm.virtio.buffers import gather, scatter, split
from vmm_kvm.virtio.chain import Chain
from vmm_kvm.virtio.device import InputTransport
from vmm_kvm.virtio.net_control import CONTROL_QUEUE_SIZE, GUEST_OFFLOADS, NetControl
from vmm_kvm.virtio.queue import Virtqueue

log = Log(__name__)

QUEUE_SIZE = 256
BUDGET = 64
"""Frames that a queue may have moved before the others."""
FRAME_MAX = 12 + 14 + 4 + 65535
"""Bytes of the largest frame, with its header."""

_VNET_SIZE = 12  # struct virtio_net_hdr_mrg_rxbuf, also where buffers are not merged
_NUM_BUFFERS = slice(10, 12)
_ONE = (1).to_bytes(2, "little")
_num_buffers = struct.Struct("<H").pack
_SOURCE = slice(_VNET_SIZE + ADDRESS_SIZE, _VNET_SIZE + 2 * ADDRESS_SIZE)

# The frames that a port can take (TUN_F_*), and the features for them: to the guest, and from it.
CSUM, TSO4, TSO6, TSO_ECN, UFO, USO4, USO6 = (1 << bit for bit in range(7))
_TO_GUEST = (
    (abi.VIRTIO_NET_F_GUEST_CSUM, CSUM),
    (abi.VIRTIO_NET_F_GUEST_TSO4, TSO4),
    (abi.VIRTIO_NET_F_GUEST_TSO6, TSO6),
    (abi.VIRTIO_NET_F_GUEST_ECN, TSO_ECN),
    (abi.VIRTIO_NET_F_GUEST_UFO, UFO),
    (abi.VIRTIO_NET_F_GUEST_USO4, USO4),
    (abi.VIRTIO_NET_F_GUEST_USO6, USO6),
)
_FROM_GUEST = (
    (abi.VIRTIO_NET_F_CSUM, CSUM),
    (abi.VIRTIO_NET_F_HOST_TSO4, TSO4),
    (abi.VIRTIO_NET_F_HOST_TSO6, TSO6),
    (abi.VIRTIO_NET_F_HOST_ECN, TSO_ECN),
    (abi.VIRTIO_NET_F_HOST_UFO, UFO),
    (abi.VIRTIO_NET_F_HOST_USO, USO4),
)


class FramePort(Protocol):
    """The source and target of frames; a frame has a header of 12 bytes in front."""

    fds: tuple[int, ...]
    """Of each queue a descriptor that is readable when a frame has come."""
    offloads: int
    """The unfinished frames that it can take and give, a mask of CSUM to USO6."""
    has_filter: bool
    """Whether it checks a frame's target itself, after `set_filter`."""

    def set_offloads(self, offloads: int) -> None:
        """Give such unfinished frames; raises OSError."""

    def set_queues(self, count: int) -> None:
        """Give frames to the first `count` queues only; raises OSError."""

    def set_filter(self, wanted: Filter | None) -> None:
        """Give frames that `wanted` accepts only; raises OSError."""

    def receive(self, queue: int, buffers: Sequence[memoryview]) -> int:
        """Read a frame into the buffers; returns its bytes, 0 if there is none."""

    def send(self, queue: int, buffers: Sequence[memoryview | bytes]) -> bool:
        """Send a frame; returns False where it is lost."""

    def close(self) -> None:
        """Leave the port as it was found; idempotent."""


class PortControl:
    """A port as the control queue sees it: features instead of its own numbers."""

    __slots__ = ("_port",)

    def __init__(self, port: FramePort) -> None:
        self._port = port

    def set_guest_offloads(self, features: int) -> None:
        """See `net_control.Port`."""
        self._port.set_offloads(sum(bit for number, bit in _TO_GUEST if features >> number & 1))

    def set_pairs(self, count: int) -> None:
        """See `net_control.Port`."""
        self._port.set_queues(count)

    def set_filter(self, wanted: Filter) -> None:
        """See `net_control.Port`."""
        self._port.set_filter(wanted)


def offload_features(offloads: int) -> int:
    """Return the features that a port with these offloads has; guest's and host's."""
    features = 0
    for number, bit in (*_TO_GUEST, *_FROM_GUEST):
        if offloads & bit:
            features |= 1 << number
    if features & GUEST_OFFLOADS:
        features |= 1 << abi.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
    return features


class Counters:
    """Frames since the device was made."""

    __slots__ = ("dropped", "received", "sent")

    def __init__(self) -> None:
        self.sent = self.received = self.dropped = 0


class VirtioNet:
    """A network interface; a `virtio.device.Backend` that owns its port, not the descriptors."""

    def __init__(
        self,
        port: FramePort,
        lladdr: bytes,
        *,
        name: str,
        mtu: int = MTU_DEFAULT,
        is_locked: bool = False,
    ) -> None:
        """Make an interface with the address `lladdr`; `name` is for the log."""
        pairs = len(port.fds)
        self.control = NetControl(
            lladdr, PortControl(port), name=name, pairs=pairs, mtu=mtu, is_locked=is_locked
        )
        self.counters = Counters()
        self.device_id = abi.VIRTIO_ID_NET
        self.features = self.control.features | offload_features(port.offloads)
        self.queue_sizes: tuple[int, ...] = (*(QUEUE_SIZE,) * (2 * pairs), CONTROL_QUEUE_SIZE)
        self._port = port
        self._name = name
        self._is_locked = is_locked
        self._is_mergeable = False
        self._control_queue: int | None = None
        self._transport: InputTransport | None = None
        self._offered = [Backlog() for _ in range(pairs)]
        self._pending: list[bytes | None] = [None] * pairs  # frames that wait for buffers
        self._scratch = memoryview(bytearray(FRAME_MAX))
        self._has_told = False

    def attach(self, transport: InputTransport) -> None:
        """Learn whom to ask for another call of `process`."""
        self._transport = transport

    def config(self) -> bytes:
        """Return the configuration space."""
        return self.control.config()

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore it: nothing there can be written."""

    def set_link(self, is_up: bool) -> None:
        """Plug the cable in or out; any thread."""
        self.control.set_link(is_up)
        if self._transport:
            self._transport.config_changed()

    def announce(self) -> None:
        """Have the driver make itself known to the network; any thread."""
        if self.control.announce() and self._transport:
            self._transport.config_changed()

    def start(self, features: int) -> None:
        """Begin with the negotiated features."""
        self._is_mergeable = bool(features >> abi.VIRTIO_NET_F_MRG_RXBUF & 1)
        self._control_queue = self.control.control_queue(features)
        self.control.start(features)
        if self._transport:
            for pair, fd in enumerate(self._port.fds):
                self._transport.watch(fd, 2 * pair)

    def serving(self, queues: Collection[int]) -> None:
        """Send frames to the pairs that a front-end has enabled, where no commands say which."""
        if self._control_queue is None:
            pairs = sum(2 * pair in queues for pair in range(len(self._offered)))
            self.control.set_pairs(max(pairs, 1))

    def process(self, index: int, queue: Virtqueue) -> None:
        """Move frames, or obey commands.

        Raises:
            GuestError: the driver broke the rules.
        """
        if index == self._control_queue:
            self.control.process(queue)
        elif index >= 2 * len(self._offered):  # commands where none were negotiated
            return
        elif index & 1:
            self._send(index >> 1, queue)
        else:
            self._receive(index >> 1, queue)

    def reset(self) -> None:
        """Forget every buffer, and the driver's settings."""
        if self._transport:
            for fd in self._port.fds:
                self._transport.unwatch(fd)
        for offered in self._offered:
            offered.clear()
        self._pending = [None] * len(self._pending)
        self.control.reset()

    def close(self) -> None:
        """Leave the port as it was found."""
        self._port.close()

    def parts(self, name: str) -> list[Part]:
        """Return the control state: frames that wait are in the queues, or lost."""
        return [Part(f"{name}/net", self.control)]

    # From the guest

    def _send(self, pair: int, queue: Virtqueue) -> None:
        pop, push, send = queue.pop, queue.push, self._port.send
        is_locked, counters = self._is_locked, self.counters
        for _ in range(BUDGET):
            chain = pop()
            if chain is None:
                return
            buffers: Sequence[memoryview | bytes] = chain.readable
            if is_locked:
                buffers = self._checked(chain.readable)
            if buffers and send(pair, buffers):
                counters.sent += 1
            else:
                counters.dropped += 1
            push(chain, 0)
        self._again(2 * pair + 1)

    def _checked(self, readable: Sequence[memoryview]) -> Sequence[memoryview | bytes]:
        """Return a frame if its source is the guest's own address, else nothing.

        The guest can change the frame at any time, so the bytes that were checked are sent.
        """
        head = gather(readable, _VNET_SIZE + HEADER_SIZE)
        if len(head) < _VNET_SIZE + HEADER_SIZE:
            return ()
        source = head[_SOURCE]
        if source != self.control.lladdr:
            if not self._has_told:
                self._has_told = True
                log.warning("%s: bad source address %s", self._name, text(source))
            return ()
        return [head, *split(readable, len(head))[1]]

    # To the guest

    def _receive(self, pair: int, queue: Virtqueue) -> None:
        waiting = self._offered[pair].collect(queue)
        port, scratch = self._port, self._scratch
        if self._pending[pair] is not None and not self._deliver_pending(pair, waiting, queue):
            return
        if not port.has_filter:
            self._receive_filtered(pair, waiting, queue)
            return
        receive, push, counters = port.receive, queue.push, self.counters
        for _ in range(BUDGET):
            if not waiting:
                return  # the driver notifies when it has more
            chain = waiting[0]
            writable = chain.writable
            size = receive(pair, [*writable, scratch])
            if not size:
                return
            first = writable[0] if writable else scratch[:0]
            room = len(first) if len(writable) == 1 else total(writable)
            if size <= room and len(first) >= _VNET_SIZE:
                first[_NUM_BUFFERS] = _ONE
                waiting.popleft()
                push(chain, size)
                counters.received += 1
                continue
            if len(first) >= _VNET_SIZE and self._deliver_rest(size - room, room, waiting, queue):
                continue
            # Split in an unusual way, or longer than the available buffers.
            head = gather(writable, min(size, room))
            self._pending[pair] = head + bytes(scratch[: max(size - room, 0)])
            if not self._deliver_pending(pair, waiting, queue):
                return
        self._again(2 * pair)

    def _deliver_rest(self, left: int, room: int, waiting: deque[Chain], queue: Virtqueue) -> bool:
        """Continue a frame in further chains; False if they do not suffice."""
        if not self._is_mergeable:
            return False
        count, more = 1, 0
        for chain in islice(waiting, 1, None):
            more += total(chain.writable)
            count += 1
            if more >= left:
                break
        if more < left:
            return False
        first = waiting.popleft()
        first.writable[0][_NUM_BUFFERS] = _num_buffers(count)
        filled, at = [(first, room)], 0
        for _ in range(count - 1):
            chain = waiting.popleft()
            written = scatter(chain.writable, self._scratch[at:left])
            filled.append((chain, written))
            at += written
        queue.push_together(filled)
        self.counters.received += 1
        return True

    def _deliver_pending(self, pair: int, waiting: deque[Chain], queue: Virtqueue) -> bool:
        """Give the driver the frame that waits; False while it has too few buffers for it."""
        frame = self._pending[pair]
        assert frame is not None
        chains: list[Chain] = []
        room = 0
        for chain in waiting:
            chains.append(chain)
            room += total(chain.writable)
            if room >= len(frame) or not self._is_mergeable:
                break
        if room < len(frame):
            if not chains or (self._is_mergeable and len(chains) < queue.size):
                return False
            self.counters.dropped += 1  # it will never fit
        else:
            header = frame[: _NUM_BUFFERS.start] + _num_buffers(len(chains))
            data, at = memoryview(header + frame[_VNET_SIZE:]), 0
            filled = []
            for chain in chains:
                waiting.popleft()
                written = scatter(chain.writable, data[at:])
                filled.append((chain, written))
                at += written
            queue.push_together(filled)
            self.counters.received += 1
        self._pending[pair] = None
        return True

    def _receive_filtered(self, pair: int, waiting: deque[Chain], queue: Virtqueue) -> None:
        """The same, for a port that gives everything: look before the guest can."""
        scratch, accepts = self._scratch, self.control.filter.accepts
        for _ in range(BUDGET):
            if not waiting:
                return
            size = self._port.receive(pair, [scratch])
            if not size:
                return
            head = bytes(scratch[_VNET_SIZE : _VNET_SIZE + HEAD_SIZE])
            if size < _VNET_SIZE + HEADER_SIZE or not accepts(head):
                self.counters.dropped += 1
                continue
            self._pending[pair] = bytes(scratch[:size])
            if not self._deliver_pending(pair, waiting, queue):
                return
        self._again(2 * pair)

    def _again(self, index: int) -> None:
        """Move the rest of a queue's frames after the others have had their turn."""
        if self._transport:
            self._transport.notify(index)
