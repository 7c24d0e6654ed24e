"""Read-only memory: firmware, which the guest executes where it lies."""

import mmap
from typing import Literal

from vmm_kvm.errors import StateError
from vmm_kvm.state import U64, Blob, PartState


class RomState(PartState):
    """Contents for a guest to read, and their address."""

    gpa: U64
    contents: Blob
    version: Literal[1] = 1


class Rom:
    """Memory with firmware in it; the machine maps it at `gpa`, for reading alone."""

    __slots__ = ("gpa", "memory")

    def __init__(self, gpa: int, contents: bytes | memoryview) -> None:
        """Copy `contents`, whole pages, for the guest-physical address `gpa`."""
        self.gpa = gpa
        self.memory = mmap.mmap(-1, len(contents))  # lives as long as the mapping
        self.memory[:] = contents

    def save(self) -> RomState:
        """Return a snapshot."""
        return RomState(gpa=self.gpa, contents=self.memory[:])

    def restore(self, state: RomState) -> None:
        """Take the contents that the guest knows, even if the host's firmware has changed since.

        Raises:
            StateError: they have another size or place.
        """
        if state.gpa != self.gpa or len(state.contents) != len(self.memory):
            raise StateError(
                f"{len(state.contents)} bytes at {state.gpa:#x}, "
                f"not {len(self.memory)} at {self.gpa:#x}"
            )
        self.memory[:] = state.contents
