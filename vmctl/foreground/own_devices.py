"""Devices that a VM in the foreground has if they are asked for; modules are loaded only then."""

from collections.abc import Iterator, Sequence
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


def with_timeout(devices: "Sequence[DeviceSpec]", has_timed_out: bool) -> "tuple[DeviceSpec, ...]":
    """Return the records for the machine after a reset, whose watchdog knows whose doing it was."""
    return tuple(
        one._replace(has_timed_out=has_timed_out) if one.kind == "watchdog" else one
        for one in devices
    )
