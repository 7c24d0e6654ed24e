"""Handing a VM over to its clones: its state and its RAM, in memory that no longer changes.

A template's RAM is such memory from the start, and is not copied. A thread copies another VM's RAM,
and the guest continues on the copy: the kernel gives it pages of its own as it writes to them.

A guest that runs is copied while it runs, and stands still for what it has changed last. The host
has its pages twice meanwhile, which its control group has room for if half of its RAM or less is
there. Otherwise, and where writes of a device are not logged, it stands still from the beginning
and is copied piece by piece, so that the host never holds all of it twice.
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
from vmm_kvm.memfd import make_constant, make_scratch
from vmm_kvm.memory import GuestMemory, adopt, freeze
from vmm_kvm.snapshot import state as states
from vmm_kvm.snapshot.cpu import CpuidRecord
from vmm_kvm.snapshot.precopy import Plan, copy_into
from vmm_kvm.snapshot.state import State
from vmm_kvm.snapshot.stream import head

if TYPE_CHECKING:
    from vmm_kvm.machine.machine import Machine

NO_BOOT = SendVm(
    keeps_running=True,
    uid=None,
    gid=None,
    boot=SentBoot(image=None, firmware=None, initrd=(), append=None),
)
"""The parent knows a clone's owner and boot image."""

NO_CPUID: tuple[CpuidRecord, ...] = ()
"""A clone has the same processor."""

OnEnd = Callable[["VmmError | OSError | None"], None]


Halt = Callable[[], None]


def _has_room(memory: GuestMemory) -> bool:
    """Tell whether a control group that is as large as RAM has room for what is in it twice.

    Copying it reads all of it, which would make pages of the holes in a file.
    """
    if memory.is_mapped:
        return False
    try:
        return 2 * memory.resident_size() <= memory.size
    except OSError:  # the kernel does not tell
        return False


_PLAN = Plan(downtime_s=0.002)


class _MemoryWriter:
    """RAM in a memfd, which stays the caller's; see `precopy.Writer`."""

    def __init__(self, fd: int, is_cancelled: Callable[[], bool]) -> None:
        self._fd = fd
        self._is_cancelled = is_cancelled
        self.written = 0

    def write_run(self, offset: int, data: bytes) -> None:
        if self._is_cancelled():
            raise SnapshotError("it was cancelled")
        view = memoryview(data)
        while view:
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count
        self.written += len(data)

    def finish(self, _state: bytes) -> None:
        """Write nothing: the state is elsewhere."""


class Capturing:
    """A VM that is being captured; has what `Sending` has."""

    def __init__(self, loop: EventLoop, on_end: OnEnd, on_written: Callable[[], None]) -> None:
        """Begin with nothing.

        `on_end` is called once, on the loop's thread, when no thread works any more: with None if
        all is there, else with what went wrong. `on_written` is called before, if the machine need
        not stand still until then.
        """
        self._loop = loop
        self._on_end = on_end
        self._on_written = on_written
        self._thread: threading.Thread | None = None
        self.is_still = False
        """Whether the machine is paused to be captured."""
        self.is_written = False
        """Whether the machine is not needed any more."""
        self._is_cancelled = False
        self._is_saved = threading.Event()
        self._failure: VmmError | OSError | None = None
        self._state = b""
        self._fds: list[int] = []

    def begin(self, machine: "Machine", spec: VmSpec, halt: Halt | None = None) -> None:
        """Capture a machine; failures are reported later.

        `halt` is called when a machine that runs has to stand still; None for one that does.
        """

        def save_state() -> None:
            self._save(machine, halt)

        def describe() -> None:
            manifest = manifest_of(machine, spec, NO_BOOT, len(self._state), NO_CPUID)
            self._fds.append(make_constant(f"state:{spec.name}", [head(manifest), self._state]))

        memory = machine.memory
        if memory.fd >= 0 and not spec.is_template:
            text = "a VM with device processes has to be a template, see start --template"
            self._fail(SnapshotError(text))
        elif halt and memory.fd < 0 and _has_room(memory):
            self._start(lambda: self._copy_running(machine, save_state, describe))
            return
        else:
            save_state()
        if memory.fd < 0 and not self._failure:
            self._start(lambda: self._copy_still(machine, describe))
            return
        try:
            if not self._failure:
                describe()
                self._fds.append(os.dup(memory.fd))
        except (VmmError, OSError) as err:
            self._failure = err
        self._loop.call_soon(lambda: self._end(self._failure))

    def _start(self, copy: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._copy, args=(copy,), name="capturing")
        self._thread.start()

    def _save(self, machine: "Machine", halt: Halt | None) -> None:
        """Take the state of a machine that stands still from now on; on the loop's thread."""
        try:
            self.is_still = True
            if halt:
                halt()
            saved = save(machine)
            self._state = states.encode(State(saved.parts, saved.blobs))
        except (VmmError, OSError) as err:
            self._failure = err
        self._is_saved.set()

    def _fail(self, err: "VmmError | OSError") -> None:
        self._failure = err
        self._is_saved.set()

    def cancel(self) -> None:
        """Copy no more, if it is not too late."""
        self._is_cancelled = True

    def abandon(self) -> None:
        """Stop copying, and wait for the thread; the loop does not run any more."""
        self.cancel()
        self._is_saved.set()
        if self._thread:
            self._thread.join()
        self._close()

    def take(self) -> list[int]:
        """Return the descriptors of state and RAM, which are the caller's now."""
        fds, self._fds = self._fds, []
        return fds

    def _copy(self, copy: Callable[[], None]) -> None:
        failure: VmmError | OSError | None = None
        try:
            copy()
        except (VmmError, OSError) as err:
            failure = err
        self._loop.call_soon(lambda: self._end(failure))

    def _copy_still(self, machine: "Machine", describe: Callable[[], None]) -> None:
        describe()
        memory = freeze(machine.memory, machine.spec.name, lambda: not self._is_cancelled)
        if memory is None:
            raise SnapshotError("it was cancelled")
        self._fds.append(memory)

    def _copy_running(
        self, machine: "Machine", save_state: Callable[[], None], describe: Callable[[], None]
    ) -> None:
        """Copy a machine while it runs; `save_state` belongs on the loop's thread."""

        def stand_still() -> bytes:
            self._loop.call_soon(save_state)
            self._is_saved.wait()
            if self._failure or self._is_cancelled:
                raise self._failure or SnapshotError("it was cancelled")
            return b""

        memory, dirty = machine.memory, machine.dirty_pages()
        if dirty.begin():
            stand_still()
            self._copy_still(machine, describe)
            return
        try:
            fd = make_scratch(f"vmm:{machine.spec.name}")
            try:
                os.ftruncate(fd, memory.size)
                writer = _MemoryWriter(fd, lambda: self._is_cancelled)
                copy_into(writer, memory, dirty, stand_still, plan=lambda: _PLAN)
                finish = adopt(memory, fd)
                self._loop.call_soon(self._on_written)
                describe()
                finish()
            except BaseException:
                os.close(fd)
                raise
            self._fds.append(fd)
        finally:
            dirty.end()

    def _end(self, failure: "VmmError | OSError | None") -> None:
        if failure:
            self._close()
        self._on_end(failure)

    def _close(self) -> None:
        for fd in self.take():
            os.close(fd)
