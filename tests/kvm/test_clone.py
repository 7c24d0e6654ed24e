"""Clones by fork: source and clone run on, each by itself."""

from __future__ import annotations

import os
import select
import traceback
from collections.abc import Callable

import pytest

from tests.kvm.test_state import Bench, bench
from vmm_kvm.devices.vm_generation import VmGeneration
from vmm_kvm.errors import RefusedError
from vmm_kvm.machine.clone import fork, renew_events
from vmm_kvm.machine.machine import Machine

pytestmark = pytest.mark.kvm


def in_child(stand: Bench, machine: Machine, act: Callable[[], None]) -> int:
    """Fork a clone and have it do `act`; returns the child, whose exit status is 0 if it did."""
    stand.output.clear()
    pid = fork(machine)
    if pid == 0:
        status = 1
        try:
            machine.start()
            machine.resume()
            act()
            status = 0
        except BaseException:  # noqa: BLE001 - the child says it by its status
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def status_of(pid: int) -> int:
    """Wait for a child; return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_both_go_on(cpus: int) -> None:
    """Clone and source each count on from the moment of the fork, and obey their own keys."""
    with bench(cpus) as stand, stand.machine() as machine:

        def count_on() -> None:
            assert stand.says(b"\n4\r\n"), stand.output
            assert stand.output.split()[:2] == [b"3", b"4"]
            machine.uart.receive(b"p")
            assert stand.run_until(lambda: bool(stand.outcomes))

        machine.start()
        assert stand.says(b"selftest: ready")
        machine.uart.receive(b"n")
        assert stand.says(b"\n2\r\n")
        machine.pause()
        children = [in_child(stand, machine, count_on) for _ in range(3)]
        machine.resume()
        count_on()
        assert [status_of(pid) for pid in children] == [0, 0, 0]


def test_only_a_paused_machine_is_cloned() -> None:
    """Cloning a running machine is refused, and the machine runs on."""
    with bench() as stand, stand.machine() as machine:
        machine.start()
        with pytest.raises(RefusedError, match="not paused"):
            fork(machine)
        assert stand.says(b"selftest: ready")


def test_events_are_the_childs_own() -> None:
    """A child's writes to its eventfds, and its watches, do not affect the parent."""
    event = os.eventfd(5, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    poll = select.epoll()
    poll.register(event, select.EPOLLIN | select.EPOLLET)
    pid = os.fork()
    if pid == 0:
        renew_events()
        seen = poll.poll(0) == [(event, select.EPOLLIN)] and os.eventfd_read(event) == 5
        os.eventfd_write(event, 9)
        poll.unregister(event)
        os._exit(0 if seen else 1)
    assert status_of(pid) == 0
    assert os.eventfd_read(event) == 5
    poll.unregister(event)
    poll.close()
    os.close(event)


def test_a_clone_is_told_that_it_is_one() -> None:
    """A clone has another generation identifier; the source keeps its own."""
    with bench() as stand, stand.machine() as machine:
        machine.start()
        assert stand.says(b"selftest: ready")
        machine.pause()
        before = _generation(machine)

        def look() -> None:
            machine.pause()
            assert _generation(machine) != before

        assert status_of(in_child(stand, machine, look)) == 0
        assert _generation(machine) == before


def _generation(machine: Machine) -> bytes:
    part = next(part for part in machine.parts() if isinstance(part.device, VmGeneration))
    assert isinstance(part.device, VmGeneration)
    return part.device.save().identifier
