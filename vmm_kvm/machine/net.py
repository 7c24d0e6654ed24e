"""A network interface of a machine: its parts, and the one that serves its queues."""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

from vmm_kvm.errors import SpecError
from vmm_kvm.limits import MTU_DEFAULT
from vmm_kvm.net.paths import Path, RemotePath, StreamPath, TapPath, VhostPath
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


class NetMemory(MappedMemory, SharedMemory, Protocol):
    """Guest memory as every path needs it; GuestMemory is one."""


class NetSpec(NamedTuple):
    """A network interface of a machine.

    Its descriptors stay the caller's, for one machine after another, never for two at once.
    """

    lladdr: bytes
    """The address that the guest reads: six bytes, not a multicast one."""
    path: Path
    name: str
    """For the log."""
    mtu: int = MTU_DEFAULT
    """Bytes of the largest packet without its Ethernet header, 68 to 65521."""
    is_locked: bool = False
    """Whether frames from another address, or to one, are dropped (`locked lladdr`).

    TapPath and StreamPath do this; on other paths the mover of the frames has to.
    """
    is_up: bool = True
    """Whether the link is up; see `Machine.set_link`."""
    kind: Literal["net"] = "net"


class Net(NamedTuple):
    """An interface as its machine has it."""

    dataplane: Dataplane
    """The server of its queues."""
    set_link: Callable[[bool], None]
    """Sets its link, and tells the driver; any thread."""
    announce: Callable[[], None]
    """Has the driver announce itself to the network, if it can; any thread."""


def make_net(spec: NetSpec, memory: NetMemory) -> Net:
    """Return the interface, its link as `spec` has it.

    Raises:
        VmmError: a descriptor is unsuitable, or a server does not do its part.
        OSError: the host has no descriptors left.
    """
    path = spec.path
    match path:
        case VhostPath():
            net = _vhost(spec, path, memory)
        case TapPath():
            net = _in_process(spec, Tap(path.taps, spec.name), memory)
        case StreamPath():
            net = _in_process(spec, Stream(path.fd, spec.name, path.traffic), memory)
        case RemotePath():
            net = _remote(spec, path, memory)
    net.set_link(spec.is_up)
    return net


def make_backend(spec: NetSpec, port: FramePort) -> VirtioNet:
    """Return the device itself, for its server."""
    return VirtioNet(port, spec.lladdr, name=spec.name, mtu=spec.mtu, is_locked=spec.is_locked)


def _in_process(spec: NetSpec, port: FramePort, memory: NetMemory) -> Net:
    backend = make_backend(spec, port)
    worker = Worker(backend, memory, spec.name)
    backend.attach(worker)
    return Net(worker, backend.set_link, backend.announce)


def _vhost(spec: NetSpec, path: VhostPath, memory: NetMemory) -> Net:
    tap = Tap(path.taps, spec.name)
    control = NetControl(
        spec.lladdr,
        PortControl(tap),
        name=spec.name,
        pairs=len(path.taps),
        mtu=spec.mtu,
        is_locked=spec.is_locked,
    )
    vhosts = [VhostNet(fd) for fd in path.vhosts]
    data = Vhost(vhosts, tap, memory, spec.name, features=offload_features(tap.offloads))
    return _split(data, control, memory, spec.name)


def _split(data: Dataplane, control: NetControl, memory: NetMemory, name: str) -> Net:
    net = SplitNet(data, control, memory, name)
    return Net(net, net.set_link, net.announce)


def _remote(spec: NetSpec, path: RemotePath, memory: NetMemory) -> Net:
    client = Client(path.connect())
    if path.is_ours:
        server = VhostUser(client, memory, spec.name, NET)

        def set_link(is_up: bool) -> None:
            server.override(STATUS_OFFSET, link_status(is_up=is_up))

        # The link does not concern the server, whose frames the host's side stops. The driver is
        # not offered GUEST_ANNOUNCE: only the server sees its answer.
        return Net(server, set_link, lambda: None)
    if spec.is_locked:
        client.close()
        raise SpecError(f"{spec.name}: locked lladdr is not for a vhost-user server")
    data = VhostUser(client, memory, spec.name, net_data(path.pairs))
    control = NetControl(
        spec.lladdr, _ServerPort(data), name=spec.name, pairs=path.pairs, mtu=spec.mtu
    )
    return _split(data, control, memory, spec.name)


class _ServerPort:
    """A port with few settings: the server decides the frames."""

    def __init__(self, data: VhostUser) -> None:
        self._data = data

    def set_guest_offloads(self, features: int) -> None:
        """Do nothing: the server knows the negotiated ones."""

    def set_pairs(self, count: int) -> None:
        """Have the other pairs not served."""
        self._data.serve_first(2 * count)

    def set_filter(self, wanted: object) -> None:
        """Do nothing: the guest filters frames itself."""
