"""Stopping a guest: its time, and the number of presses."""

from __future__ import annotations

import pytest

from tests.fakes import FakeClock
from vmd.vm.shutdown import AGAIN_NS, LOOK_NS, REACTION_NS, SHUTDOWN_NS, Shutdown

NOTICED = LOOK_NS


class Guest:
    """A guest that may obey its power button, and its outcome."""

    def __init__(self, *, listens: bool = True, notices: bool = True) -> None:
        self.clock = FakeClock()
        self.begun_ns = self.clock.monotonic_ns()
        self.listens, self.notices = listens, notices
        self.presses: list[int] = []
        self.ended: list[int] = []
        self.shutdown = Shutdown(self, self.clock, lambda: self.ended.append(self._now()))

    def _now(self) -> int:
        return self.clock.monotonic_ns() - self.begun_ns

    def press_power_button(self) -> bool:
        """Note the time of the press."""
        self.presses.append(self._now())
        return self.listens

    def has_noticed_power_button(self) -> bool:
        """Tell whether it reacts."""
        return self.notices


def test_a_guest_that_stops_in_time_is_left_alone() -> None:
    """A guest that stops in time is asked once, and not ended."""
    guest = Guest()
    guest.shutdown.begin()
    guest.clock.advance(AGAIN_NS)
    assert (guest.presses, guest.ended) == ([0], [])
    assert guest.shutdown.has_begun


def test_the_button_is_pressed_again_and_again() -> None:
    """The button is pressed every 10 s after the guest's reaction; after 120 s it is ended."""
    guest = Guest()
    guest.shutdown.begin()
    guest.clock.advance(2 * SHUTDOWN_NS)
    again = range(NOTICED + AGAIN_NS, NOTICED + SHUTDOWN_NS, AGAIN_NS)
    assert guest.presses == [0, *again]
    assert guest.ended == [NOTICED + SHUTDOWN_NS]


def test_a_guest_that_does_not_react_is_ended_soon() -> None:
    """A guest that does not react has 3 s, and is not asked again."""
    guest = Guest(notices=False)
    guest.shutdown.begin()
    guest.clock.advance(2 * SHUTDOWN_NS)
    assert (guest.presses, guest.ended) == ([0], [REACTION_NS])


def test_a_late_reaction_counts() -> None:
    """A guest that reacts just before its time-out gets all the time to stop."""
    guest = Guest(notices=False)
    guest.shutdown.begin()
    guest.clock.advance(REACTION_NS - LOOK_NS)
    guest.notices = True
    guest.clock.advance(LOOK_NS)
    guest.clock.advance(SHUTDOWN_NS - 1)
    assert guest.ended == []
    guest.clock.advance(1)
    assert guest.ended == [REACTION_NS + SHUTDOWN_NS]


def test_a_guest_that_does_not_listen_is_ended_at_once() -> None:
    """A guest that does not listen to the button is ended at once."""
    guest = Guest(listens=False)
    guest.shutdown.begin()
    assert guest.ended == [0]


@pytest.mark.parametrize("listens", [True, False])
def test_a_second_stop_is_the_first(listens: bool) -> None:
    """A second stop neither presses the button, nor gives the guest more time."""
    guest = Guest(listens=listens)
    for _ in range(2):
        guest.shutdown.begin()
    assert guest.presses == [0]
    assert len(guest.ended) == (not listens)
