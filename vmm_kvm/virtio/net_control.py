"""virtio-net's configuration space and control queue.

They are the same on every data path. The driver's wishes go to the frames' port: which frames,
which offloads, how many queue pairs. An unknown or forbidden command is answered with an error; a
malformed one stops the device.

Source: virtio 1.2 §5.1.4, §5.1.6.5
"""

import struct
from typing import Annotated, Literal, Protocol

from vmm_kvm.errors import StateError, VirtqueueError
from vmm_kvm.limits import MTU_DEFAULT, QUEUE_PAIRS_MAX
from vmm_kvm.log import Log
from vmm_kvm.net.ethernet import ADDRESS_SIZE, Filter, is_group, locked_filter, text
from vmm_kvm.scatter import total
from vmm_kvm.state import U64, Length, PartState, Range
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.buffers import gather
from vmm_kvm.virtio.queue import Virtqueue

log = Log(__name__)

CONTROL_QUEUE_SIZE = 64
TABLE_MAX = 64
"""Addresses of each kind in the filter; a driver with more gets every frame."""

STATUS_OFFSET = ADDRESS_SIZE
"""Of the status, 16 bits, in the configuration space."""
_CONFIG = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu
_COMMAND_SIZE = 2
_COUNT_SIZE = 4
_DATA_MAX = 2 * (_COUNT_SIZE + 4096 * ADDRESS_SIZE)
_OK, _ERR = abi.VIRTIO_NET_OK, abi.VIRTIO_NET_ERR
_VLANS = 4096

GUEST_OFFLOADS = (
    1 << abi.VIRTIO_NET_F_GUEST_CSUM
    | 1 << abi.VIRTIO_NET_F_GUEST_TSO4
    | 1 << abi.VIRTIO_NET_F_GUEST_TSO6
    | 1 << abi.VIRTIO_NET_F_GUEST_ECN
    | 1 << abi.VIRTIO_NET_F_GUEST_UFO
    | 1 << abi.VIRTIO_NET_F_GUEST_USO4
    | 1 << abi.VIRTIO_NET_F_GUEST_USO6
)
"""Features that say which frames the driver takes."""

_BASE_FEATURES = (
    1 << abi.VIRTIO_NET_F_MAC
    | 1 << abi.VIRTIO_NET_F_MTU
    | 1 << abi.VIRTIO_NET_F_STATUS
    | 1 << abi.VIRTIO_NET_F_MRG_RXBUF
    | 1 << abi.VIRTIO_NET_F_CTRL_VQ
    | 1 << abi.VIRTIO_NET_F_CTRL_RX
    | 1 << abi.VIRTIO_NET_F_CTRL_RX_EXTRA
    | 1 << abi.VIRTIO_NET_F_CTRL_VLAN
    | 1 << abi.VIRTIO_NET_F_GUEST_ANNOUNCE
)


class Port(Protocol):
    """The settings of a port that the control queue changes; OSError if its interface is gone."""

    def set_guest_offloads(self, features: int) -> None:
        """Send the driver such frames as these features (VIRTIO_NET_F_GUEST_*) say."""

    def set_pairs(self, count: int) -> None:
        """Use the first `count` queue pairs for frames to the driver."""

    def set_filter(self, wanted: Filter) -> None:
        """Send the driver the frames that it wants, as far as possible."""


def link_status(*, is_up: bool) -> bytes:
    """Return the status field of an interface whose link is up, or down."""
    return (abi.VIRTIO_NET_S_LINK_UP if is_up else 0).to_bytes(2, "little")


_Addresses = Annotated[
    frozenset[Annotated[bytes, Length(ADDRESS_SIZE, ADDRESS_SIZE)]], Length(0, TABLE_MAX)
]


class NetState(PartState):
    """The driver's settings of its interface."""

    lladdr: Annotated[bytes, Length(ADDRESS_SIZE, ADDRESS_SIZE)]
    is_promiscuous: bool
    has_all_group: bool
    has_all_unicast: bool
    has_no_group: bool
    has_no_unicast: bool
    has_no_broadcast: bool
    unicast: _Addresses
    group: _Addresses
    vlans: frozenset[Annotated[int, Range(0, _VLANS - 1)]]
    pairs: Annotated[int, Range(1, QUEUE_PAIRS_MAX)]
    """Queue pairs in use."""
    offloads: U64
    """Features (VIRTIO_NET_F_GUEST_*) that say which frames it gets."""
    is_up: bool
    is_announcing: bool
    version: Literal[1] = 1


class NetControl:
    """The state that driver and device share; everything but `config` on the device's thread.

    `set_link` and `announce` may come from any: they change single attributes.
    """

    def __init__(
        self,
        lladdr: bytes,
        port: Port,
        *,
        name: str,
        pairs: int = 1,
        mtu: int = MTU_DEFAULT,
        is_locked: bool = False,
    ) -> None:
        """Begin with the link up; `name` is for the log."""
        assert len(lladdr) == ADDRESS_SIZE
        assert not is_group(lladdr)
        assert 1 <= pairs <= QUEUE_PAIRS_MAX
        self.features = _BASE_FEATURES
        """Features of the control queue and the configuration space."""
        if pairs > 1:
            self.features |= 1 << abi.VIRTIO_NET_F_MQ
        if not is_locked:
            self.features |= 1 << abi.VIRTIO_NET_F_CTRL_MAC_ADDR
        self.filter = locked_filter(lladdr) if is_locked else Filter(lladdr)
        """The frames that the driver is to get."""
        self._own_lladdr = lladdr
        self._is_locked = is_locked
        self._port = port
        self._name = name
        self._pairs = pairs
        self._mtu = mtu
        self._negotiated = 0
        self._is_up = True
        self._is_announcing = False
        self._vlans: set[int] = set()
        self._offloads = 0
        self._pairs_used = 1

    @property
    def lladdr(self) -> bytes:
        """The driver's address at the moment."""
        return self.filter.lladdr

    def config(self) -> bytes:
        """Return the configuration space; any thread."""
        status = abi.VIRTIO_NET_S_LINK_UP if self._is_up else 0
        if self._is_announcing:
            status |= abi.VIRTIO_NET_S_ANNOUNCE
        return _CONFIG.pack(self.filter.lladdr, status, self._pairs, self._mtu)

    def set_link(self, is_up: bool) -> None:
        """Plug the cable in or out; the transport has to tell the driver."""
        self._is_up = is_up

    def announce(self) -> bool:
        """Ask the driver to announce itself to the network, until it says that it has.

        Returns whether it can, and so the transport has to tell it.

        Source: virtio 1.2 §5.1.6.5.4
        """
        can = bool(self._negotiated >> abi.VIRTIO_NET_F_GUEST_ANNOUNCE & 1)
        self._is_announcing = can
        return can

    def control_queue(self, features: int) -> int | None:
        """Return which queue commands come in, or None.

        Source: virtio 1.2 §5.1.2
        """
        if not features >> abi.VIRTIO_NET_F_CTRL_VQ & 1:
            return None
        return 2 * self._pairs if features >> abi.VIRTIO_NET_F_MQ & 1 else 2

    def start(self, features: int) -> None:
        """Begin with the negotiated features: everything is wanted, by the first pair."""
        self._negotiated = features
        self._set_filter(Filter(self.lladdr))
        self._set_offloads(features & GUEST_OFFLOADS)
        self.set_pairs(1)

    def set_pairs(self, count: int) -> bool:
        """Use the first `count` queue pairs; returns whether that could be done."""
        is_done = self._try(lambda: self._port.set_pairs(count))
        if is_done:
            self._pairs_used = count
        return is_done

    def _set_offloads(self, offloads: int) -> bool:
        is_done = self._try(lambda: self._port.set_guest_offloads(offloads))
        if is_done:
            self._offloads = offloads
        return is_done

    def reset(self) -> None:
        """Forget the driver's settings, its own address included."""
        self._negotiated = 0
        self._is_announcing = False
        self._vlans.clear()
        self.filter = self.filter._replace(lladdr=self._own_lladdr)

    # Snapshots; when nothing runs

    def save(self) -> NetState:
        """Return the driver's settings."""
        wanted = self.filter
        return NetState(
            lladdr=wanted.lladdr,
            is_promiscuous=wanted.is_promiscuous,
            has_all_group=wanted.has_all_group,
            has_all_unicast=wanted.has_all_unicast,
            has_no_group=wanted.has_no_group,
            has_no_unicast=wanted.has_no_unicast,
            has_no_broadcast=wanted.has_no_broadcast,
            unicast=wanted.unicast,
            group=wanted.group,
            vlans=frozenset(self._vlans),
            pairs=self._pairs_used,
            offloads=self._offloads,
            is_up=self._is_up,
            is_announcing=self._is_announcing,
        )

    def restore(self, state: NetState) -> None:
        """Apply the saved settings; after `start`, if the driver was ready.

        Raises:
            StateError: the driver cannot have said so.
        """
        if is_group(state.lladdr) or (self._is_locked and state.lladdr != self._own_lladdr):
            raise StateError(f"lladdr: {text(state.lladdr)} is not for this interface")
        if state.pairs > self._pairs:
            raise StateError(f"pairs: {state.pairs} of {self._pairs}")
        if state.offloads & ~(self._negotiated & GUEST_OFFLOADS):
            raise StateError(f"offloads: {state.offloads:#x} were not negotiated")
        self._is_up = state.is_up
        self._is_announcing = state.is_announcing
        self._vlans = set(state.vlans)
        wanted = Filter(
            lladdr=state.lladdr,
            is_promiscuous=state.is_promiscuous,
            has_all_group=state.has_all_group,
            has_all_unicast=state.has_all_unicast,
            has_no_group=state.has_no_group,
            has_no_unicast=state.has_no_unicast,
            has_no_broadcast=state.has_no_broadcast,
            unicast=state.unicast,
            group=state.group,
        )
        if not self._negotiated:
            self.filter = wanted
            return
        self._set_filter(wanted)
        self._set_offloads(state.offloads)
        self.set_pairs(state.pairs)

    def process(self, queue: Virtqueue) -> None:
        """Obey every command that is available.

        Raises:
            VirtqueueError: one has no place for its answer, or is no command.
        """
        while chain := queue.pop():
            command = gather(chain.readable, _COMMAND_SIZE + _DATA_MAX)
            if len(command) < _COMMAND_SIZE or not chain.writable:
                raise VirtqueueError(
                    f"{self._name}: a command without code, or room for its answer"
                )
            is_done = total(chain.readable) == len(command) and self._obey(
                command[0], command[1], command[_COMMAND_SIZE:]
            )
            chain.writable[0][0] = _OK if is_done else _ERR
            queue.push(chain, 1)

    def _obey(self, kind: int, code: int, data: bytes) -> bool:
        """Execute a command; returns whether that succeeded."""
        negotiated = self._negotiated
        match kind:
            case abi.VIRTIO_NET_CTRL_RX:
                return self._receive_mode(code, data)
            case abi.VIRTIO_NET_CTRL_MAC if code == abi.VIRTIO_NET_CTRL_MAC_TABLE_SET:
                return self._set_table(data)
            case abi.VIRTIO_NET_CTRL_MAC if code == abi.VIRTIO_NET_CTRL_MAC_ADDR_SET:
                return self._set_mac(data)
            case abi.VIRTIO_NET_CTRL_VLAN:
                return self._set_vlan(code, data)
            case abi.VIRTIO_NET_CTRL_ANNOUNCE if code == abi.VIRTIO_NET_CTRL_ANNOUNCE_ACK:
                self._is_announcing = False
                return True
            case abi.VIRTIO_NET_CTRL_MQ if code == abi.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET:
                count = int.from_bytes(data, "little")
                if len(data) != 2 or not 1 <= count <= self._pairs:
                    return False
                return self.set_pairs(count)
            case abi.VIRTIO_NET_CTRL_GUEST_OFFLOADS:
                offloads = int.from_bytes(data, "little")
                allowed = negotiated & GUEST_OFFLOADS
                if code != abi.VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET or len(data) != 8:
                    return False
                if offloads & ~allowed:
                    return False
                return self._set_offloads(offloads)
        return False

    def _receive_mode(self, code: int, data: bytes) -> bool:
        if len(data) != 1:
            return False
        is_on = bool(data[0])
        match code:
            case abi.VIRTIO_NET_CTRL_RX_PROMISC:
                changed = self.filter._replace(is_promiscuous=is_on)
            case abi.VIRTIO_NET_CTRL_RX_ALLMULTI:
                changed = self.filter._replace(has_all_group=is_on)
            case abi.VIRTIO_NET_CTRL_RX_ALLUNI:
                changed = self.filter._replace(has_all_unicast=is_on)
            case abi.VIRTIO_NET_CTRL_RX_NOMULTI:
                changed = self.filter._replace(has_no_group=is_on)
            case abi.VIRTIO_NET_CTRL_RX_NOUNI:
                changed = self.filter._replace(has_no_unicast=is_on)
            case abi.VIRTIO_NET_CTRL_RX_NOBCAST:
                changed = self.filter._replace(has_no_broadcast=is_on)
            case _:
                return False
        return self._set_filter(changed)

    def _set_table(self, data: bytes) -> bool:
        """Take the list of further unicast addresses, then the one of multicast addresses."""
        tables = []
        for _ in range(2):
            count = int.from_bytes(data[:_COUNT_SIZE], "little")
            end = _COUNT_SIZE + count * ADDRESS_SIZE
            if len(data) < end:
                return False
            tables.append(
                [data[at : at + ADDRESS_SIZE] for at in range(_COUNT_SIZE, end, ADDRESS_SIZE)]
            )
            data = data[end:]
        unicast, group = tables
        changed = self.filter._replace(
            unicast=frozenset(unicast[:TABLE_MAX]),
            group=frozenset(group[:TABLE_MAX]),
            has_all_unicast=len(unicast) > TABLE_MAX,
            has_all_group=len(group) > TABLE_MAX,
        )
        return self._set_filter(changed)

    def _set_mac(self, data: bytes) -> bool:
        if self._is_locked or len(data) != ADDRESS_SIZE or is_group(data):
            log.info("%s: the guest may not take the address %s", self._name, text(data[:8]))
            return False
        return self._set_filter(self.filter._replace(lladdr=data))

    def _set_vlan(self, code: int, data: bytes) -> bool:
        vlan = int.from_bytes(data, "little")
        if len(data) != 2 or vlan >= _VLANS:
            return False
        match code:
            case abi.VIRTIO_NET_CTRL_VLAN_ADD:
                self._vlans.add(vlan)
            case abi.VIRTIO_NET_CTRL_VLAN_DEL:
                self._vlans.discard(vlan)
            case _:
                return False
        return self._set_filter(self.filter)

    def _set_filter(self, wanted: Filter) -> bool:
        """Apply the filter, within the limits of a locked address."""
        if self._negotiated >> abi.VIRTIO_NET_F_CTRL_VLAN & 1:
            wanted = wanted._replace(vlans=frozenset(self._vlans))
        else:
            wanted = wanted._replace(vlans=None)
        if self._is_locked:
            wanted = locked_filter(self._own_lladdr)
        self.filter = wanted
        return self._try(lambda: self._port.set_filter(wanted))

    def _try(self, change: "Change") -> bool:
        try:
            change()
        except OSError as err:
            log.warning("%s: %s", self._name, err)
            return False
        return True


class Change(Protocol):
    """Something that the host may refuse."""

    def __call__(self) -> None:
        """Do it; raises OSError."""
