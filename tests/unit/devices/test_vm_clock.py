"""The VMClock device: what its page says, when that changes, and how the guest hears of it."""

from __future__ import annotations

import struct
from itertools import count

from tests.fakes import RecordingIrqLine
from vmm_kvm.devices.vm_clock import VmClock

_PAGE = 4096
# Offsets, as in the specification, of seq_count, disruption_marker and vm_generation_counter.
_SEQUENCE, _DISRUPTION, _GENERATION = 0x0C, 0x10, 0x68


def made(first: int = 1) -> tuple[VmClock, RecordingIrqLine]:
    """Return one whose random numbers are counted."""
    numbers, irq = count(first), RecordingIrqLine()
    clock = VmClock(lambda size: next(numbers).to_bytes(size, "little"))
    clock.attach(irq)
    return clock, irq


def told(clock: VmClock) -> tuple[int, int, int]:
    """Return sequence, disruption marker and generation, as a guest reads them."""
    (sequence,) = struct.unpack_from("<I", clock.memory, _SEQUENCE)
    (disruption,) = struct.unpack_from("<Q", clock.memory, _DISRUPTION)
    (generation,) = struct.unpack_from("<Q", clock.memory, _GENERATION)
    return sequence, disruption, generation


def test_the_page_of_a_new_vm() -> None:
    """It names itself, tells no time, and says that it has a generation and interrupts."""
    clock, irq = made()
    constant = b"VCLK" + struct.pack("<IHBB", _PAGE, 1, 0xFF, 0)
    changing = struct.pack("<IQQ", 0, 1, 1 << 8 | 1 << 9)
    page = (constant + changing).ljust(_GENERATION, b"\0") + struct.pack("<Q", 2)
    assert clock.memory[:] == page.ljust(_PAGE, b"\0")
    assert irq.levels == []


def test_a_moved_vm_is_told_of_its_clock() -> None:
    """It is no copy: the generation stays. One edge."""
    clock, irq = made()
    clock.disrupt()
    assert told(clock) == (2, 3, 2)
    assert (irq.rises, irq.level) == (1, False)


def test_a_copy_is_told_that_it_is_one() -> None:
    """Both numbers change."""
    clock, irq = made()
    clock.disrupt(is_copy=True)
    assert told(clock) == (2, 3, 4)
    assert irq.rises == 1


def test_numbers_differ_between_copies_and_from_before() -> None:
    """A random number that is the one before is not taken."""
    numbers = iter((5, 6, 5, 7))
    clock = VmClock(lambda size: next(numbers).to_bytes(size, "little"))
    clock.disrupt()
    assert told(clock) == (2, 7, 6)


def test_a_restored_clock_goes_on() -> None:
    """A restored clock is unchanged until it is declared another one."""
    clock, _ = made()
    clock.disrupt()
    other, irq = made(100)
    other.restore(clock.save())
    assert other.memory[:] == clock.memory[:]
    assert irq.levels == []
    other.disrupt()
    assert told(other)[0] == 4


def test_a_saved_odd_sequence_does_not_make_readers_wait() -> None:
    """No program of a guest spins for ever on a snapshot that was edited."""
    clock, _ = made()
    clock.restore(clock.save().but(sequence=7))
    assert told(clock)[0] == 6
