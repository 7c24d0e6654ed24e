"""The network interfaces of VMs, as the rest of the parent sees them.

`tap_networks` makes taps, with root's rights; `passt_networks` does without privileges.
"""

from collections.abc import Collection, Mapping
from typing import Protocol

from vmd.config.model import Config
from vmd.confine.confinements import Kind
from vmd.parent.interfaces import Links, Then, Trouble
from vmd.parent.peer import AnyPeer
from vmd.rules.vm import Vm
from vmd.wire.messages import InterfaceInfo


class Networks(Protocol):
    """Networks of all VMs, on the event loop's thread."""

    @property
    def peers(self) -> Mapping[Kind, AnyPeer]:
        """The processes that they need."""

    @property
    def pids(self) -> Collection[int]:
        """Other children of this process, which end by themselves and have not been reaped yet."""

    def reaped(self, pid: int, status: int) -> None:
        """Note that a child of this process, maybe one of `pids`, has been reaped.

        `status` is its exit status, or minus the number of a signal.
        """

    def watch(self, trouble: Trouble) -> None:
        """Call `trouble` from now on; `refresh` returns changes for guests."""

    def configure(self, config: Config) -> None:
        """Configure the host's network as in a vm.conf; running VMs keep their addresses."""

    def add(self, config: Config) -> None:
        """Add the switches of another file; of two with the same name the first counts."""

    def forget_switches(self) -> None:
        """Remove all switches; interfaces stay on bridges that are not ours."""

    def attach(self, vm: Vm, then: Then) -> None:
        """Make a VM's interfaces, or find them from before its reboot; then call `then`, once."""

    def release(self, vm_id: int) -> None:
        """Remove a VM's interfaces, if it has any."""

    def refresh(self) -> Mapping[int, Links]:
        """Bring interfaces up and down as VMs and switches are configured now.

        Returns the links, by id, of the VMs for whose guests this changes something.
        """

    def told(self, vm: Vm) -> tuple[InterfaceInfo, ...]:
        """Return the description of a VM's interfaces."""

    def close(self) -> None:
        """Remove all interfaces."""
