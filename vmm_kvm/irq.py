"""Interrupt pins as devices see them: a level that can be set."""

from typing import Protocol


class IrqLine(Protocol):
    """One interrupt input of the machine's interrupt controllers.

    A level-triggered device sets True while it asks and False once it is served; an
    edge-triggered (ISA) device sets True and lets the level fall before the next edge.
    """

    def set(self, level: bool) -> None:
        """Drive the pin; may be called from any thread."""
