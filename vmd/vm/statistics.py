"""A VM's statistics, as its process reports them."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vmd.shared.counters import Counters
from vmd.wire.internal import VmStatistics
from vmd.wire.parts import Exits, MemoryUse, Moved, Statistics
from vmm_kvm.net.paths import Traffic

if TYPE_CHECKING:
    from vmm_kvm.machine.machine import Machine


def statistics_of(
    machine: "Machine", disks: Mapping[int, Counters], streams: Mapping[int, Traffic]
) -> VmStatistics:
    """Return the counters of a machine, its disks and the streams of its interfaces, by index."""
    moved_disks = tuple(
        Moved(index=index, to_guest=disk.read, from_guest=disk.written)
        for index, disk in disks.items()
    )
    moved = tuple(
        Moved(index=index, to_guest=stream.received, from_guest=stream.sent)
        for index, stream in streams.items()
    )
    balloon = machine.balloon
    if balloon:
        balloon.ask()
    use = balloon.memory_use if balloon else None
    return VmStatistics(
        statistics=Statistics(
            cpu_ns=time.process_time_ns(),
            disk_read=sum(disk.to_guest for disk in moved_disks),
            disk_written=sum(disk.from_guest for disk in moved_disks),
            net_received=sum(stream.to_guest for stream in moved),
            net_sent=sum(stream.from_guest for stream in moved),
            disks=moved_disks,
            streams=moved,
            exits=tuple(
                Exits(reason=reason, count=count) for reason, count in machine.exit_counts().items()
            ),
            guest_memory=MemoryUse(**use._asdict()) if use else None,
            given_back=balloon.given_back if balloon else None,
        ),
        memory_used=machine.info().used_size,
    )
