"""The order in which VMs start and stop: `after "db"` of vm.conf.

When the daemon starts a VM, it waits as long as one of the VMs before it waits or is starting; a VM
is up when its guest runs. One that fails, or is not to start, delays none. With ordered stops, a VM
is asked to stop when those that start after it, and are being stopped, have ended.

Source: systemd.unit(5), "After=", for what it means; OpenBSD has no such thing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from vmd.config.model import VmConfig
from vmd.rules.vm import Vm
from vmd.rules.vm_state import IDLE, Phase


def next_to_start(vms: Sequence[Vm]) -> list[Vm]:
    """Return those of `vms` that wait for their turn, but for no other VM."""
    pending = {vm.name for vm in vms if vm.state.phase in {Phase.WAITING, Phase.STARTING}}
    return [
        vm for vm in vms if vm.state.phase is Phase.WAITING and pending.isdisjoint(vm.config.after)
    ]


def ring_of(config: VmConfig, find: Callable[[str], VmConfig | None]) -> list[str]:
    """Return a cycle of names from a VM's to its own, each starting after the next, if any.

    `find` knows the other VMs by their names.
    """
    came_from: dict[str, str] = {}
    left = [(config.name, config.after)]
    while left:
        name, after = left.pop()
        for other in after:
            if other in came_from:
                continue
            came_from[other] = name
            if other == config.name:
                return list(_way_back(other, came_from))[::-1]
            found = find(other)
            left.append((other, found.after if found else ()))
    return []


def _way_back(name: str, came_from: dict[str, str]) -> Iterator[str]:
    yield name
    at = came_from[name]
    while at != name:
        yield at
        at = came_from[at]
    yield name


class Stops:
    """VMs that are to be asked to stop when others have ended."""

    def __init__(self) -> None:
        """Begin without any."""
        self._ids: dict[int, None] = {}  # in the order of asking

    def add(self, vm: Vm) -> None:
        """Let a VM be asked in its turn."""
        self._ids[vm.id] = None

    def must_wait(self, vm: Vm, vms: Iterable[Vm]) -> bool:
        """Tell whether one of `vms` that starts after this one is being stopped."""
        return any(
            vm.name in other.config.after
            and (other.id in self._ids or other.state.phase is Phase.STOPPING)
            for other in vms
        )

    def take(self, vms: Sequence[Vm]) -> list[Vm]:
        """Return VMs whose turn it is now; they wait no more, nor do those that have ended."""
        known = {vm.id: vm for vm in vms if vm.state.phase not in IDLE}
        waiting = [known[vm_id] for vm_id in self._ids if vm_id in known]
        ready = [vm for vm in waiting if not self.must_wait(vm, vms)]
        self._ids = {vm.id: None for vm in waiting if vm not in ready}
        return ready
