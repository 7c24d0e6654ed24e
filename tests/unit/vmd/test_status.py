"""The status of VMs, put together from what their processes and the host's interfaces tell."""

from __future__ import annotations

from vmd.config.model import Owner, VmConfig
from vmd.internal import VmStatistics
from vmd.messages import AnyAnswer, InterfaceInfo, Statistics, Status, Vms
from vmd.registry import List
from vmd.status import StatusQuestion
from vmd.vm import Vm
from vmd.vm_state import Phase, Ticket, VmState
from vmm_kvm.loop import EventLoop


def test_traffic_of_taps_and_of_streams_is_added() -> None:
    """The host counts what goes through taps, the VM's process what goes through streams."""
    vm = Vm(VmConfig(name="web", owner=Owner(0)), VmState(1, phase=Phase.RUNNING, pid=7), 0)
    question = List(Ticket(1, 1), Status(serial=1, statistics=True), (vm,))
    interfaces = (
        InterfaceInfo(lladdr="", received=100, sent=10),
        InterfaceInfo(lladdr="", received=200, sent=20),
    )
    answers: list[AnyAnswer] = []
    with EventLoop() as loop:
        asked = StatusQuestion(loop, question, {1}, answers.extend, lambda _vm: interfaces)
        told = Statistics(disk_read=5, net_received=1, net_sent=2)
        asked.told(1, VmStatistics(serial=1, statistics=told, memory_used=0))
    (answer,) = answers
    assert isinstance(answer, Vms)
    assert answer.vms[0].statistics == Statistics(disk_read=5, net_received=301, net_sent=32)
