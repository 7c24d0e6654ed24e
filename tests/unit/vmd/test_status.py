"""The status of VMs, from their processes and the host's interfaces."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from vmd.config.model import Owner, VmConfig
from vmd.parent.status import PATIENCE_NS, Inquiries, StatusQuestion
from vmd.rules.actions import List
from vmd.rules.vm import Vm
from vmd.rules.vm_state import Phase, Ticket, VmState
from vmd.wire.internal import VmStatistics
from vmd.wire.messages import AnyAnswer, InterfaceInfo, Status, Vms
from vmd.wire.parts import Statistics
from vmm_kvm.loop import EventLoop

INTERFACES = (
    InterfaceInfo(lladdr="", received=100, sent=10),
    InterfaceInfo(lladdr="", received=200, sent=20),
)


class Rig:
    """Questions for the status of VM 1, with the test as its process."""

    def __init__(self, loop: EventLoop) -> None:
        self.loop = loop
        self.asked: list[int] = []
        self.inquiries = Inquiries(loop, self.asked.append)
        self.answers: list[AnyAnswer] = []
        self._vm = Vm(VmConfig(name="web", owner=Owner(0)), VmState(1, pid=7), 0)
        self._vm.state = self._vm.state._replace(phase=Phase.RUNNING)

    def ask(self, serial: int = 1) -> StatusQuestion:
        """Ask a question."""
        question = List(Ticket(1, serial), Status(serial=serial, statistics=True), (self._vm,))

        def answer(_question: StatusQuestion, parts: list[AnyAnswer]) -> None:
            self.answers.extend(parts)

        made = StatusQuestion(self.loop, question, self.inquiries, answer, lambda _vm: INTERFACES)
        made.ask({1})
        return made

    def tell(self, disk_read: int) -> None:
        """Answer as the VM's process."""
        told = Statistics(disk_read=disk_read, net_received=1, net_sent=2)
        self.inquiries.told(1, VmStatistics(statistics=told, memory_used=0))

    def run_for(self, ns: int) -> None:
        """Let some time pass."""
        self.loop.timer(self.loop.stop).arm(self.loop.monotonic_ns() + ns)
        self.loop.run()

    def told(self) -> list[Statistics | None]:
        """Return the answers so far."""
        return [vm.statistics for one in self.answers if isinstance(one, Vms) for vm in one.vms]


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Return questions of a loop that does not run."""
    with EventLoop() as loop:
        yield Rig(loop)


def test_traffic_of_taps_and_of_streams_is_added(rig: Rig) -> None:
    """The host counts traffic of taps, the VM's process that of streams."""
    rig.ask()
    rig.tell(5)
    assert rig.told() == [Statistics(disk_read=5, net_received=301, net_sent=32)]


def test_a_question_that_is_over_is_gone(rig: Rig) -> None:
    """Answered, late or cancelled, a question is in no cycle, whose collection might take long."""
    gc.disable()
    try:
        questions = [weakref.ref(rig.ask(serial)) for serial in (1, 2)]
        rig.tell(5)
        rig.run_for(2 * PATIENCE_NS)
        cancelled = rig.ask(3)
        cancelled.cancel()
        questions.append(weakref.ref(cancelled))
        del cancelled
        rig.run_for(2 * PATIENCE_NS)
        assert [question() for question in questions] == [None] * 3
    finally:
        gc.enable()


def test_a_vm_process_is_asked_once_for_all(rig: Rig) -> None:
    """Questions during another one share its answer, and so do those right after."""
    rig.loop.stop_clock()
    for serial in range(100):
        rig.ask(serial)
    assert rig.asked == [1]
    rig.tell(5)
    for serial in range(100, 200):
        rig.ask(serial)
    assert rig.asked == [1]
    assert [one.serial for one in rig.answers] == list(range(200))


def test_a_vm_process_is_asked_again_after_a_while(rig: Rig) -> None:
    """An answer is reused for a tenth of a second, and never after the process has ended."""
    rig.ask()
    rig.tell(5)
    rig.run_for(110_000_000)
    rig.ask(2)
    assert rig.asked == [1, 1]
    rig.tell(6)
    rig.inquiries.forget(1)
    rig.ask(3)
    assert rig.asked == [1, 1, 1]


def test_a_vm_process_that_does_not_answer_is_not_asked_again(rig: Rig) -> None:
    """If a VM process does not answer, clients get a status without its statistics."""
    rig.ask(1)
    rig.run_for(400_000_000)
    assert rig.told() == [None]
    rig.ask(2)
    assert rig.asked == [1]
    rig.inquiries.forget(1)
    assert rig.told() == [None, None]


def test_a_question_that_is_cancelled_is_not_answered(rig: Rig) -> None:
    """Other clients that wait for the same answer get it."""
    cancelled = rig.ask(1)
    rig.ask(2)
    cancelled.cancel()
    rig.tell(5)
    assert [one.serial for one in rig.answers] == [2]
