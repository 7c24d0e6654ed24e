"""A network interface, from what it is made of to who serves its queues."""

from typing import Protocol

from vmm_kvm.net.nic import NicParams, RemotePath, StreamPath, TapPath, VhostPath
from vmm_kvm.net.stream import Stream
from vmm_kvm.net.tap import Tap
from vmm_kvm.net.vhost import VhostNet
from vmm_kvm.virtio.device import Dataplane
from vmm_kvm.virtio.net import FramePort, PortControl, VirtioNet, offload_features
from vmm_kvm.virtio.net_control import NetControl
from vmm_kvm.virtio.net_split import SplitNet
from vmm_kvm.virtio.vhost import MappedMemory, Vhost
from vmm_kvm.virtio.vhost_user.client import Client
from vmm_kvm.virtio.vhost_user.frontend import NET, NET_DATA, SharedMemory, VhostUser
from vmm_kvm.virtio.worker import Worker


class NicMemory(MappedMemory, SharedMemory, Protocol):
    """Guest memory as every path needs it; GuestMemory is one."""


def make_nic(params: NicParams, memory: NicMemory) -> Dataplane:
    """Return who serves the interface's queues.

    Raises:
        VmmError: a descriptor is not what it has to be, or a server does not do what it should.
        OSError: the host has no descriptors left.
    """
    path = params.path
    match path:
        case VhostPath():
            return _vhost(params, path, memory)
        case TapPath():
            return _in_process(params, Tap(path.taps, params.name), memory)
        case StreamPath():
            return _in_process(params, Stream(path.fd, params.name), memory)
        case RemotePath():
            return _remote(params, path, memory)


def make_backend(params: NicParams, port: FramePort) -> VirtioNet:
    """Return the device itself, for whoever serves it."""
    return VirtioNet(port, params.mac, name=params.name, mtu=params.mtu, is_locked=params.is_locked)


def _in_process(params: NicParams, port: FramePort, memory: NicMemory) -> Dataplane:
    backend = make_backend(params, port)
    worker = Worker(backend, memory, params.name)
    backend.attach(worker)
    return worker


def _vhost(params: NicParams, path: VhostPath, memory: NicMemory) -> Dataplane:
    tap = Tap(path.taps, params.name)
    control = NetControl(
        params.mac,
        PortControl(tap),
        name=params.name,
        pairs=len(path.taps),
        mtu=params.mtu,
        is_locked=params.is_locked,
    )
    vhosts = [VhostNet(fd) for fd in path.vhosts]
    data = Vhost(vhosts, tap, memory, params.name, features=offload_features(tap.offloads))
    return SplitNet(data, control, memory, params.name)


def _remote(params: NicParams, path: RemotePath, memory: NicMemory) -> Dataplane:
    client = Client(path.connect())
    if path.is_ours:
        return VhostUser(client, memory, params.name, NET)
    control = NetControl(
        params.mac, _NoPort(), name=params.name, mtu=params.mtu, is_locked=params.is_locked
    )
    return SplitNet(VhostUser(client, memory, params.name, NET_DATA), control, memory, params.name)


class _NoPort:
    """A port that takes no orders: the server sends what it sends."""

    def set_guest_offloads(self, features: int) -> None:
        """Do nothing: the server knows the negotiated ones."""

    def set_pairs(self, count: int) -> None:
        """Do nothing: there is one."""

    def set_filter(self, wanted: object) -> None:
        """Do nothing: to filter is the guest's own affair, where nobody does it for it."""
