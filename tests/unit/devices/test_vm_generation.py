"""The VM's generation identifier: its address, its changes, and the guest's notification."""

from __future__ import annotations

from itertools import count

from tests.fakes import RecordingIrqLine
from vmm_kvm.devices.vm_generation import SIZE, VmGeneration


def made() -> tuple[VmGeneration, RecordingIrqLine]:
    """Return a device whose random numbers are counted."""
    numbers = count(1)
    irq = RecordingIrqLine()
    generation = VmGeneration(lambda size: bytes((next(numbers),)) * size)
    generation.attach(irq)
    return generation, irq


def test_a_new_vm_has_one_and_says_nothing() -> None:
    """A new VM has an identifier at the beginning of its page, and is not notified."""
    generation, irq = made()
    assert generation.memory[:] == (b"\1" * SIZE).ljust(4096, b"\0")
    assert irq.levels == []


def test_another_vm_has_another_one_and_says_so() -> None:
    """A copy gets another identifier, with one edge for each change."""
    generation, irq = made()
    for number in (2, 3):
        generation.renew()
        assert generation.memory[:SIZE] == bytes((number,)) * SIZE
        assert irq.rises == number - 1
    assert not irq.level


def test_a_restored_vm_is_the_same() -> None:
    """A restored VM keeps its identifier until it is declared a copy."""
    generation, _ = made()
    other, irq = made()
    other.renew()
    other.restore(generation.save())
    assert other.memory[:SIZE] == generation.memory[:SIZE]
    assert irq.rises == 1
