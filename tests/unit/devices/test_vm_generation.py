"""The VM's generation identifier: where it is, when it changes, and how the guest hears of it."""

from __future__ import annotations

from itertools import count

from tests.fakes import RecordingIrqLine
from vmm_kvm.devices.vm_generation import SIZE, VmGeneration


def made() -> tuple[VmGeneration, RecordingIrqLine]:
    """Return one whose random numbers are counted."""
    numbers = count(1)
    irq = RecordingIrqLine()
    generation = VmGeneration(lambda size: bytes((next(numbers),)) * size)
    generation.attach(irq)
    return generation, irq


def test_a_new_vm_has_one_and_says_nothing() -> None:
    """It lies at the beginning of its page; the rest is zero."""
    generation, irq = made()
    assert generation.memory[:] == (b"\1" * SIZE).ljust(4096, b"\0")
    assert irq.levels == []


def test_another_vm_has_another_one_and_says_so() -> None:
    """One edge for each change."""
    generation, irq = made()
    for number in (2, 3):
        generation.renew()
        assert generation.memory[:SIZE] == bytes((number,)) * SIZE
        assert irq.rises == number - 1
    assert not irq.level


def test_a_restored_vm_is_the_same() -> None:
    """Until somebody says that it is not."""
    generation, _ = made()
    other, irq = made()
    other.renew()
    other.restore(generation.save())
    assert other.memory[:SIZE] == generation.memory[:SIZE]
    assert irq.rises == 1
