"""VM processes that do not answer: a question to one that is stopped by a signal never ends."""

from collections.abc import Callable
from typing import Protocol

from vmd.wire.channel import Timer
from vmm_kvm.clock import NANOSECONDS

PATIENCE_S = 10
"""How long a process may take to report that its VM is paused, or runs."""
_STOPPED = {"T", "t"}
"""In /proc/PID/stat: by a signal, or by a debugger. Source: proc_pid_stat(5)."""


class _Loop(Protocol):
    def timer(self, callback: Callable[[], None]) -> Timer:
        """Return a timer that calls `callback`."""

    def monotonic_ns(self) -> int:
        """Return the time."""


class Silences:
    """Processes that were asked something and have not answered, by the ids of their VMs."""

    def __init__(self, loop: _Loop, on_silence: Callable[[int], None]) -> None:
        """Begin without any; `on_silence` is called again and again as long as one lasts."""
        self._loop = loop
        self._on_silence = on_silence
        self._timers: dict[int, Timer] = {}

    def begin(self, vm_id: int) -> None:
        """Note that a process was asked something."""
        timer = self._timers.get(vm_id)
        if timer is None:
            timer = self._timers[vm_id] = self._loop.timer(lambda: self._fire(vm_id))
        timer.arm(self._loop.monotonic_ns() + PATIENCE_S * NANOSECONDS)

    def end(self, vm_id: int) -> None:
        """Note that a process has answered, or is gone."""
        timer = self._timers.pop(vm_id, None)
        if timer:
            timer.cancel()

    def _fire(self, vm_id: int) -> None:
        self.begin(vm_id)
        self._on_silence(vm_id)


def why_silent(pid: int | None) -> str:
    """Say, in one line, that a process does not answer, and why if that can be seen."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - the plainest
            state = file.read().rpartition(b") ")[2][:1].decode()
    except OSError:
        state = ""
    text = "the VM process does not answer"
    if state in _STOPPED:
        text += f": a signal has stopped it, and kill -CONT {pid} lets it go on"
    return text
