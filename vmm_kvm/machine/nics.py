"""A network interface, from what it is made of to who serves its queues."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from vmm_kvm.errors import SpecError
from vmm_kvm.net.nic import NicParams, RemotePath, StreamPath, TapPath, VhostPath
from vmm_kvm.net.stream import Stream
from vmm_kvm.net.tap import Tap
from vmm_kvm.net.vhost import VhostNet
from vmm_kvm.virtio.device import Dataplane
from vmm_kvm.virtio.net import FramePort, PortControl, VirtioNet, offload_features
from vmm_kvm.virtio.net_control import STATUS_OFFSET, NetControl, link_status
from vmm_kvm.virtio.net_split import SplitNet
from vmm_kvm.virtio.vhost import MappedMemory, Vhost
from vmm_kvm.virtio.vhost_user.client import Client
from vmm_kvm.virtio.vhost_user.frontend import NET, SharedMemory, VhostUser, net_data
from vmm_kvm.virtio.worker import Worker


class NicMemory(MappedMemory, SharedMemory, Protocol):
    """Guest memory as every path needs it; GuestMemory is one."""


class Nic(NamedTuple):
    """An interface as its machine has it."""

    dataplane: Dataplane
    """Who serves its queues."""
    set_link: Callable[[bool], None]
    """Plugs its cable in or out, which the driver is told; any thread."""
    announce: Callable[[], None]
    """Has the driver make itself known to the network, if it can; any thread."""


def make_nic(params: NicParams, memory: NicMemory) -> Nic:
    """Return the interface, its link as `params` has it.

    Raises:
        VmmError: a descriptor is not what it has to be, or a server does not do what it should.
        OSError: the host has no descriptors left.
    """
    path = params.path
    match path:
        case VhostPath():
            nic = _vhost(params, path, memory)
        case TapPath():
            nic = _in_process(params, Tap(path.taps, params.name), memory)
        case StreamPath():
            nic = _in_process(params, Stream(path.fd, params.name, path.traffic), memory)
        case RemotePath():
            nic = _remote(params, path, memory)
    nic.set_link(params.is_up)
    return nic


def make_backend(params: NicParams, port: FramePort) -> VirtioNet:
    """Return the device itself, for whoever serves it."""
    return VirtioNet(
        port, params.lladdr, name=params.name, mtu=params.mtu, is_locked=params.is_locked
    )


def _in_process(params: NicParams, port: FramePort, memory: NicMemory) -> Nic:
    backend = make_backend(params, port)
    worker = Worker(backend, memory, params.name)
    backend.attach(worker)
    return Nic(worker, backend.set_link, backend.announce)


def _vhost(params: NicParams, path: VhostPath, memory: NicMemory) -> Nic:
    tap = Tap(path.taps, params.name)
    control = NetControl(
        params.lladdr,
        PortControl(tap),
        name=params.name,
        pairs=len(path.taps),
        mtu=params.mtu,
        is_locked=params.is_locked,
    )
    vhosts = [VhostNet(fd) for fd in path.vhosts]
    data = Vhost(vhosts, tap, memory, params.name, features=offload_features(tap.offloads))
    return _split(data, control, memory, params.name)


def _split(data: Dataplane, control: NetControl, memory: NicMemory, name: str) -> Nic:
    net = SplitNet(data, control, memory, name)
    return Nic(net, net.set_link, net.announce)


def _remote(params: NicParams, path: RemotePath, memory: NicMemory) -> Nic:
    client = Client(path.connect())
    if path.is_ours:
        server = VhostUser(client, memory, params.name, NET)

        def set_link(is_up: bool) -> None:
            server.override(STATUS_OFFSET, link_status(is_up=is_up))

        # The cable is no business of the server's, whose frames the host's side stops. Its driver
        # is not offered to announce itself: what it answers, the server hears alone.
        return Nic(server, set_link, lambda: None)
    if params.is_locked:
        client.close()
        raise SpecError(f"{params.name}: locked lladdr is not for a vhost-user server")
    data = VhostUser(client, memory, params.name, net_data(path.pairs))
    control = NetControl(
        params.lladdr, _ServerPort(data), name=params.name, pairs=path.pairs, mtu=params.mtu
    )
    return _split(data, control, memory, params.name)


class _ServerPort:
    """A port that takes few orders: the server sends what it sends."""

    def __init__(self, data: VhostUser) -> None:
        self._data = data

    def set_guest_offloads(self, features: int) -> None:
        """Do nothing: the server knows the negotiated ones."""

    def set_pairs(self, count: int) -> None:
        """Have the other pairs not served."""
        self._data.serve_first(2 * count)

    def set_filter(self, wanted: object) -> None:
        """Do nothing: to filter is the guest's own affair, where nobody does it for it."""
