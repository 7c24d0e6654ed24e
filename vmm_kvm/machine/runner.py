"""vCPU threads: run, dispatch exits, pause, resume, stop.

Each vCPU has one thread, in KVM_RUN for nearly all of its life. Exits for devices are dispatched
here, on that thread, under the device's own lock; exits that end the VM go to `on_exit`.

Protocol: another thread changes `_mode` under `_condition` and kicks every vCPU. A kicked vCPU
returns from KVM_RUN as `Interrupted`, with any device access of its last exit completed, and looks
at the mode after it has cleared the kick: a change can be seen early but never missed.
"""

import enum
import threading
from collections.abc import Callable, Sequence

from vmm_kvm.arch.x86.dispatch import Collected, dispatch
from vmm_kvm.bus import Bus
from vmm_kvm.errors import KvmError
from vmm_kvm.kvm.exits import Exit, Interrupted
from vmm_kvm.kvm.vcpu import Vcpu
from vmm_kvm.log import Log

log = Log(__name__)


class Mode(enum.Enum):
    """What all vCPU threads of a VM are to do."""

    RUN = "run"
    PAUSE = "pause"
    STOP = "stop"


class Runner:
    """The vCPU threads of one VM.

    `collected`, if any, takes the writes that KVM has collected; see `dispatch`.
    `on_exit(vcpu, exit)` is called on the vCPU's thread for every exit that is not a device
    access, and returns whether the vCPU goes on; `on_failure` for an exception, a bug of ours,
    that ended a thread. Both may call `request_stop`, neither may wait for threads.
    """

    def __init__(
        self,
        vcpus: Sequence[Vcpu],
        pio: Bus,
        mmio: Bus,
        *,
        collected: Collected | None,
        on_exit: Callable[[Vcpu, Exit], bool],
        on_failure: Callable[[Exception], None],
    ) -> None:
        """Prepare one thread per vCPU; none runs before `start`."""
        self._vcpus = vcpus
        self._pio = pio
        self._mmio = mmio
        self._collected = collected
        self._on_exit = on_exit
        self._on_failure = on_failure
        self._mode = Mode.RUN
        self._condition = threading.Condition()
        self._running = 0
        self._threads = [
            threading.Thread(target=self._run, args=(vcpu,), name=f"vcpu{vcpu.index}")
            for vcpu in vcpus
        ]

    def start(self) -> None:
        """Start every vCPU; called once, on the thread that made this object."""
        self._running = len(self._threads)
        for thread in self._threads:
            thread.start()

    def request_pause(self) -> None:
        """Ask every vCPU to stand still, without waiting for it."""
        self._change(Mode.PAUSE)

    def pause(self) -> None:
        """Let every vCPU stand still; returns when all do. Not for vCPU threads."""
        self._change(Mode.PAUSE)
        with self._condition:
            self._condition.wait_for(lambda: self._running == 0)

    def resume(self) -> None:
        """Let vCPUs that stand still go on; nothing happens once they were told to stop."""
        self._change(Mode.RUN)

    def request_stop(self) -> None:
        """Ask every vCPU to end, without waiting for it; any thread."""
        self._change(Mode.STOP)

    def stop(self) -> None:
        """End every vCPU thread and wait for it; idempotent. Not for vCPU threads."""
        self._change(Mode.STOP)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _change(self, mode: Mode) -> None:
        with self._condition:
            if Mode.STOP in {self._mode, mode}:
                mode = Mode.STOP
            self._mode = mode
            self._condition.notify_all()
        if mode is not Mode.RUN:
            for vcpu in self._vcpus:
                vcpu.kick()

    def _goes_on(self) -> bool:
        """Stand still while the VM is paused; False when the thread has to end."""
        with self._condition:
            if self._mode is Mode.PAUSE:
                self._running -= 1
                self._condition.notify_all()
                self._condition.wait_for(lambda: self._mode is not Mode.PAUSE)
                self._running += 1
            return self._mode is Mode.RUN

    def _run(self, vcpu: Vcpu) -> None:
        try:
            dispatch(vcpu, self._pio, self._mmio, self._leave, self._collected)
        except KvmError as err:
            self._on_failure(err)
        except Exception as err:
            log.exception("vcpu%d", vcpu.index)
            self._on_failure(err)
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()

    def _leave(self, vcpu: Vcpu, reason: Exit) -> bool:
        if isinstance(reason, Interrupted):
            vcpu.clear_immediate_exit()
            return self._goes_on()
        return self._on_exit(vcpu, reason)
