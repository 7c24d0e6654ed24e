"""A client's question for the status of VMs, while the processes of those are asked."""

from collections.abc import Callable, Collection

from msgspec.structs import replace

from vmd.internal import VmStatistics
from vmd.messages import VMS_PER_PART, AnyAnswer, InterfaceInfo, VmInfo, Vms
from vmd.registry import List, info
from vmd.vm import Vm
from vmm_kvm.loop import EventLoop

PATIENCE_NS = 300_000_000
"""How long a VM process may take to answer; then the others' answers are shown without it."""


class StatusQuestion:
    """One question; `answer` is called once, with all that goes to the client."""

    def __init__(
        self,
        loop: EventLoop,
        question: List,
        running: Collection[int],
        answer: Callable[[list[AnyAnswer]], None],
        interfaces: Callable[[Vm], tuple[InterfaceInfo, ...]],
    ) -> None:
        """Answer at once if no VM that is asked for is among those `running`, ids.

        `interfaces` is asked for a VM's if the client wants to know of them, or what they moved.
        """
        self.ticket = question.ticket
        self._vms = question.vms
        self._wants_statistics = question.request.statistics
        self._wants_interfaces = question.request.interfaces
        self._interfaces = interfaces
        self._answer = answer
        self._told: dict[int, VmStatistics] = {}
        self.missing = {
            vm.id for vm in question.vms if vm.id in running and vm.state.pid is not None
        }
        """Ids of VMs that have not said anything yet."""
        self.is_over = False
        self._timer = loop.timer(self._finish)
        if self.missing:
            self._timer.arm(loop.monotonic_ns() + PATIENCE_NS)
        else:
            self._finish()

    def told(self, vm_id: int, statistics: VmStatistics) -> None:
        """Take what a VM process said."""
        self._told[vm_id] = statistics
        self.missing.discard(vm_id)
        if not self.missing:
            self._finish()

    def cancel(self) -> None:
        """Forget it: nobody waits for the answer."""
        self.is_over = True
        self._timer.cancel()

    def _finish(self) -> None:
        if self.is_over:
            return
        self.cancel()
        shown = [self._shown(vm) for vm in self._vms]
        serial = self.ticket.serial
        parts: list[AnyAnswer] = [
            Vms(
                serial=serial,
                vms=tuple(shown[at : at + VMS_PER_PART]),
                has_more=at + VMS_PER_PART < len(shown),
            )
            for at in range(0, len(shown), VMS_PER_PART)
        ]
        self._answer(parts or [Vms(serial=serial, vms=())])

    def _shown(self, vm: Vm) -> VmInfo:
        told, shown = self._told.get(vm.id), info(vm)
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
