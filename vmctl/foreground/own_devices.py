"""Devices that a VM in the foreground has if they are asked for; modules are loaded only then."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm_kvm.machine.spec import DeviceSpec


def own_devices(console: bool, balloon: bool, watchdog: bool) -> "Iterator[DeviceSpec]":
    """Yield the records of the devices that are wanted."""
    if console:
        from vmm_kvm.virtio.console import ConsoleSpec  # noqa: PLC0415 - few VMs have one

        yield ConsoleSpec()
    if balloon:
        from vmm_kvm.virtio.balloon import BalloonSpec  # noqa: PLC0415 - the same

        yield BalloonSpec()
    if watchdog:
        from vmm_kvm.pci.i6300esb import WatchdogSpec  # noqa: PLC0415 - the same

        yield WatchdogSpec()
