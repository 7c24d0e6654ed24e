"""Asking a guest to stop: by vmmci or the power button, with OpenBSD's patience.

A guest is killed if it does not react within 3 s, or still runs 120 s after that; so is one that
cannot be asked. A configured time replaces these limits.

While it stops the button is pressed again now and then: a guest that was just about to listen lost
the first press, because drivers clear the button's status before they enable it.

Source: section 8.3 of OpenBSD's behaviour.
"""

from collections.abc import Callable
from typing import Protocol

from vmm_kvm.clock import NANOSECONDS, Clock
from vmm_kvm.log import Log

log = Log(__name__)

REACTION_NS = 3 * NANOSECONDS
"""How long a guest may take to react to the request."""
SHUTDOWN_NS = 120 * NANOSECONDS
"""How long it may take after it has."""
LOOK_NS = NANOSECONDS // 4
"""Between two looks whether it has noticed."""
AGAIN_NS = 10 * NANOSECONDS
"""Between two presses."""


class Button(Protocol):
    """The machine, as far as it can be asked to stop."""

    def press_power_button(self) -> bool:
        """Ask the guest; False if it does not listen."""

    def has_noticed_power_button(self) -> bool:
        """Tell whether the guest has reacted."""


class Shutdown:
    """One attempt to stop a guest, on the clock's thread."""

    def __init__(self, machine: Button, clock: Clock, on_over: Callable[[], None]) -> None:
        """Prepare; `on_over` is called once, when the guest's time is over."""
        self._machine = machine
        self._clock = clock
        self._on_over = on_over
        self._deadline_ns: int | None = None
        self._has_noticed = False
        self._timeout_ns: int | None = None
        self._is_over = False
        self._timer = clock.timer(self._look)

    @property
    def has_begun(self) -> bool:
        """Whether the guest has been asked."""
        return self._deadline_ns is not None

    @property
    def is_over(self) -> bool:
        """Whether the guest's time was over before it stopped."""
        return self._is_over

    def begin(self, timeout_ns: int | None = None) -> None:
        """Ask the guest, once; if no driver listens, its time is over at once.

        `timeout_ns`: how long it has in all; None for the usual times.
        """
        if self.has_begun:
            return
        self._timeout_ns = timeout_ns
        now = self._clock.monotonic_ns()
        self._deadline_ns = now
        if self._machine.press_power_button():
            self._deadline_ns = now + (REACTION_NS if timeout_ns is None else timeout_ns)
            self._timer.arm(min(now + LOOK_NS, self._deadline_ns))
        else:
            self._end()

    def _end(self) -> None:
        self._is_over = True
        self._on_over()

    def _look(self) -> None:
        now = self._clock.monotonic_ns()
        is_again = self._has_noticed
        if not is_again and self._machine.has_noticed_power_button():
            self._has_noticed = True
            if self._timeout_ns is None:
                self._deadline_ns = now + SHUTDOWN_NS
        deadline = self._deadline_ns or now
        if now >= deadline:
            log.info("the guest did not stop: ended")
            self._end()
            return
        if is_again:
            self._machine.press_power_button()
        self._timer.arm(min(now + (AGAIN_NS if self._has_noticed else LOOK_NS), deadline))
