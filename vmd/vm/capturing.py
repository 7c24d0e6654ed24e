"""Handing a VM over to its clones: its state and its RAM, in memory that no longer changes.

A template's RAM is such memory from the start, and is not copied. A thread copies another VM's RAM
piece by piece, and the guest continues on the copy: the kernel gives it pages of its own as it
writes to them. So the host never holds all of it twice.
"""

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmd.vm.sending import manifest_of
from vmd.wire.internal import VmSpec
from vmd.wire.leaving import SendVm
from vmd.wire.transfers import SentBoot
from vmm_kvm.errors import SnapshotError, VmmError
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.state import save
from vmm_kvm.memfd import make_constant
from vmm_kvm.memory import freeze
from vmm_kvm.snapshot import state as states
from vmm_kvm.snapshot.cpu import CpuidRecord
from vmm_kvm.snapshot.state import State
from vmm_kvm.snapshot.stream import head

if TYPE_CHECKING:
    from vmm_kvm.machine.machine import Machine

_NOTHING = SendVm(
    keeps_running=True,
    uid=None,
    gid=None,
    boot=SentBoot(image=None, firmware=None, initrd=(), append=None),
)
"""The parent knows a clone's owner and boot image."""

OnEnd = Callable[["VmmError | OSError | None"], None]


class Capturing:
    """A VM that is being captured, from its pause to its end; has what `Sending` has."""

    def __init__(self, loop: EventLoop, on_end: OnEnd) -> None:
        """Begin with nothing.

        `on_end` is called once, on the loop's thread, when no thread works any more: with None if
        all is there, else with what went wrong.
        """
        self._loop = loop
        self._on_end = on_end
        self._thread: threading.Thread | None = None
        self.is_still = True
        """Whether the machine is paused to be captured."""
        self.is_written = False
        """Whether the machine is not needed any more."""
        self._is_cancelled = False
        self._fds: list[int] = []

    def begin(self, machine: "Machine", spec: VmSpec, cpuid: tuple[CpuidRecord, ...]) -> None:
        """Capture a paused machine; failures are reported later.

        `cpuid` is what this host's processor shows to such a guest.
        """
        try:
            if machine.memory.fd >= 0 and not spec.is_template:
                text = "a VM with device processes has to be a template, see start --template"
                raise SnapshotError(text)
            saved = save(machine)
            state = states.encode(State(saved.parts, saved.blobs))
            manifest = manifest_of(machine, spec, _NOTHING, len(state), cpuid)
            self._fds.append(make_constant(f"state:{spec.name}", [head(manifest), state]))
            if machine.memory.fd >= 0:
                self._fds.append(os.dup(machine.memory.fd))
                self._loop.call_soon(lambda: self._end(None))
                return
        except (VmmError, OSError) as err:
            failure = err
            self._loop.call_soon(lambda: self._end(failure))
            return
        self._thread = threading.Thread(target=self._copy, args=(machine,), name="capturing")
        self._thread.start()

    def cancel(self) -> None:
        """Copy no more, if it is not too late."""
        self._is_cancelled = True

    def abandon(self) -> None:
        """Stop copying, and wait for the thread; the loop does not run any more."""
        self.cancel()
        if self._thread:
            self._thread.join()
        self._close()

    def take(self) -> list[int]:
        """Return the descriptors of state and RAM, which are the caller's now."""
        fds, self._fds = self._fds, []
        return fds

    def _copy(self, machine: "Machine") -> None:
        failure: VmmError | OSError | None = None
        try:
            memory = freeze(machine.memory, machine.spec.name, lambda: not self._is_cancelled)
            if memory is None:
                raise SnapshotError("it was cancelled")
            self._fds.append(memory)
        except (VmmError, OSError) as err:
            failure = err
        self._loop.call_soon(lambda: self._end(failure))

    def _end(self, failure: "VmmError | OSError | None") -> None:
        if failure:
            self._close()
        self._on_end(failure)

    def _close(self) -> None:
        for fd in self.take():
            os.close(fd)
