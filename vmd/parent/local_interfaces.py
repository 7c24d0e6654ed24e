"""The parent's side of the local process: its guests, and their sockets."""

from collections.abc import Callable, Sequence

from vmd.parent.interfaces import Interface
from vmd.parent.local_sockets import open_dns, open_frames, resolver
from vmd.parent.peer import Peer
from vmd.rules.addressing import is_host_name
from vmd.rules.vm import Vm
from vmd.wire.channel import Fds, Loop
from vmd.wire.internal import (
    LocalAddresses,
)
from vmd.wire.local import PARENT_AND_LOCAL, ForgetLocal, LocalToParent, ParentToLocal, ServeLocal
from vmm_kvm.boot_device import BootDevice
from vmm_kvm.log import Log

log = Log(__name__)


class LocalInterfaces:
    """Has the guests on local interfaces answered."""

    def __init__(self, loop: Loop, on_start: Callable[[], None]) -> None:
        """Begin without a local process; `on_start` is called for each one that starts."""
        self.peer: Peer[ParentToLocal, LocalToParent] = Peer(
            "local", PARENT_AND_LOCAL, loop, _take, on_start=on_start
        )

    def serve(self, vm: Vm, interfaces: Sequence[Interface]) -> None:
        """Have a VM's guest answered on its local interfaces."""
        if not self.peer.is_there:
            return
        boots = vm.config.boot_device is BootDevice.NET
        for index, interface in enumerate(interfaces):
            local = interface.spec.local
            if local is None:
                continue
            fds = _sockets(interface, local)
            if not fds:
                continue
            message = ServeLocal(
                id=vm.id,
                interface=interface.spec.alias,
                lladdr=interface.spec.lladdr,
                addresses=local,
                host_name=vm.name if is_host_name(vm.name) else "",
                boots_from_net=boots and index == 0,
                dns=tuple(range(1, len(fds))),
                resolver=resolver(),
            )
            self.peer.send(message, fds)

    def forget(self, vm_id: int) -> None:
        """Answer a VM's guest no more."""
        self.peer.send(ForgetLocal(id=vm_id))


def _sockets(interface: Interface, local: LocalAddresses) -> list[int]:
    """Return a packet socket, and those for DNS; none if the guest cannot be answered."""
    name, alias = interface.tap.name, interface.spec.alias
    try:
        fds = [open_frames(name, has_ipv6=bool(local.host6))]
    except OSError as err:
        log.warning("%s: no DHCP: %s", alias, err.strerror)
        return []
    for address in filter(None, (local.host4, local.host6)):
        try:
            fds.append(open_dns(address, name))
        except OSError as err:
            log.warning("%s: no DNS on %s: %s", alias, address, err.strerror)
    return fds


def _take(_message: LocalToParent, _fds: Fds) -> None:
    """Ignore messages of the local process: it has none to send."""
