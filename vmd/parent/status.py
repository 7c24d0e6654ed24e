"""Clients' questions for the status of VMs, while the processes of those are asked."""

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from typing import Protocol

import msgspec
from msgspec.structs import replace

from vmd.rules.actions import List
from vmd.rules.vm import Vm, info
from vmd.wire.channel import Timer
from vmd.wire.internal import VmStatistics
from vmd.wire.messages import PART_MAX, AnyAnswer, DiskInfo, InterfaceInfo, VmInfo, Vms
from vmd.wire.parts import ShareInfo
from vmm_kvm.boot.firmware import BIOS

PATIENCE_NS = 300_000_000
"""How long a VM process may take to answer; after that the status is shown without its answer."""
FRESH_NS = 100_000_000
"""How long an answer of a VM process is reused: however many clients ask, it answers no more often,
so that they cannot delay its guest's devices."""

_encoder = msgspec.json.Encoder()


class TimedLoop(Protocol):
    """An event loop's clock."""

    def monotonic_ns(self) -> int:
        """Return nanoseconds on the loop's clock."""

    def timer(self, callback: Callable[[], None]) -> Timer:
        """Make a timer that is not armed."""


class Inquiries:
    """Asks VM processes for statistics: one question at a time to each, shared by all that ask."""

    def __init__(self, loop: TimedLoop, ask: Callable[[int], None]) -> None:
        """`ask` sends the question to a VM, by its id; `told` takes the answer."""
        self._loop = loop
        self._ask = ask
        self._waiting: dict[int, dict[StatusQuestion, None]] = {}  # in the order of asking
        self._told: dict[int, tuple[int, VmStatistics]] = {}

    def join(self, vm_id: int, question: "StatusQuestion") -> None:
        """Give `question` the answer of a VM process, at once if it is known."""
        at_ns, told = self._told.get(vm_id, (0, None))
        if told is not None and self._loop.monotonic_ns() - at_ns < FRESH_NS:
            question.told(vm_id, told)
            return
        is_asked = vm_id in self._waiting
        self._waiting.setdefault(vm_id, {})[question] = None
        if not is_asked:
            self._ask(vm_id)

    def leave(self, vm_id: int, question: "StatusQuestion") -> None:
        """Forget that `question` waits; the VM process is not asked again before it answers."""
        self._waiting.get(vm_id, {}).pop(question, None)

    def told(self, vm_id: int, statistics: VmStatistics) -> None:
        """Take a VM process's answer."""
        self._told[vm_id] = self._loop.monotonic_ns(), statistics
        for question in self._waiting.pop(vm_id, ()):
            question.told(vm_id, statistics)

    def forget(self, vm_id: int) -> None:
        """Note the end of a VM process: waiting questions are answered without it."""
        self._told.pop(vm_id, None)
        for question in self._waiting.pop(vm_id, ()):
            question.lost(vm_id)


class StatusQuestion:
    """One question; `answer` is called once, with it and all that goes to the client.

    It is in no cycle of references once it is over: floods leave more of them than the collector
    of cycles keeps up with.
    """

    def __init__(
        self,
        loop: TimedLoop,
        question: List,
        inquiries: Inquiries,
        answer: "Callable[[StatusQuestion, list[AnyAnswer]], None]",
        interfaces: Callable[[Vm], tuple[InterfaceInfo, ...]],
    ) -> None:
        """Prepare to ask.

        `interfaces` is called for a VM's if the client wants them, or their traffic.
        """
        self.ticket = question.ticket
        self._loop = loop
        self._vms = question.vms
        self._gone = question.gone
        self._own = question.own if question.request.devices else frozenset()
        self._wants_statistics = question.request.statistics
        self._wants_interfaces = question.request.interfaces
        self._inquiries = inquiries
        self._interfaces = interfaces
        self._answer = answer
        self._told: dict[int, VmStatistics] = {}
        self._missing: set[int] = set()
        self._is_over = False
        self._timer: Timer | None = loop.timer(self._finish)

    def ask(self, running: Collection[int]) -> None:
        """Ask those of the VMs that are among `running`, ids; answer once all have, or soon."""
        self._missing = {vm.id for vm in self._vms if vm.id in running and vm.state.pid is not None}
        if self._timer:
            self._timer.arm(self._loop.monotonic_ns() + PATIENCE_NS)
        for vm_id in tuple(self._missing):
            self._inquiries.join(vm_id, self)
        if not self._missing:
            self._finish()

    def told(self, vm_id: int, statistics: VmStatistics) -> None:
        """Take a VM process's answer."""
        self._told[vm_id] = statistics
        self.lost(vm_id)

    def lost(self, vm_id: int) -> None:
        """Wait no more for a VM."""
        self._missing.discard(vm_id)
        if not self._missing:
            self._finish()

    def cancel(self) -> None:
        """Forget it: no client waits for the answer."""
        self._is_over = True
        if self._timer:
            self._timer.cancel()
            self._timer = None
        for vm_id in self._missing:
            self._inquiries.leave(vm_id, self)

    def _finish(self) -> None:
        if self._is_over:
            return
        self.cancel()
        parts = list(_parts(chain(map(self._shown, self._vms), self._gone)))
        last = len(parts) - 1
        self._answer(
            self,
            [
                Vms(serial=self.ticket.serial, vms=tuple(part), has_more=at < last)
                for at, part in enumerate(parts)
            ],
        )

    def _shown(self, vm: Vm) -> VmInfo:
        told, shown = self._told.get(vm.id), info(vm)
        if vm.id in self._own:
            shown = _with_devices(shown, vm)
        if not (self._wants_interfaces or self._wants_statistics):
            return shown if told is None else replace(shown, memory_used=told.memory_used)
        interfaces = self._interfaces(vm)
        if self._wants_interfaces:
            shown = replace(shown, interfaces=interfaces)
        if told is None:
            return shown
        # The kernel counts frames at the host's side of an interface; where that is no tap but a
        # stream, the VM's process does.
        statistics = replace(
            told.statistics,
            net_received=told.statistics.net_received + sum(one.received for one in interfaces),
            net_sent=told.statistics.net_sent + sum(one.sent for one in interfaces),
        )
        return replace(
            shown,
            memory_used=told.memory_used,
            statistics=statistics if self._wants_statistics else None,
        )


def _with_devices(shown: VmInfo, vm: Vm) -> VmInfo:
    """Return the description of a VM with its boot image and its disks."""
    config, passed = vm.config, vm.passed
    path = passed.path if passed and passed.kernel is not None else config.boot
    append = passed.append if passed and passed.kernel is not None else config.append
    return replace(
        shown,
        boot=path or config.firmware or BIOS,
        append=append,
        cdrom=config.cdrom or "",
        shares=tuple(ShareInfo(**share._asdict()) for share in config.shares),
        disks=tuple(
            DiskInfo(
                path=disk.path,
                format=disk.kind,
                is_read_only=disk.is_read_only,
                is_snapshot=disk.is_snapshot,
                serial=disk.serial,
            )
            for disk in config.disks
        ),
    )


def _parts(vms: Iterable[VmInfo]) -> Iterator[list[VmInfo]]:
    """Yield VMs in lists that are one answer each; at least one list."""
    part: list[VmInfo] = []
    size = 0
    for vm in vms:
        added = len(_encoder.encode(vm))
        if part and size + added > PART_MAX:
            yield part
            part, size = [], 0
        part.append(vm)
        size += added
    yield part
