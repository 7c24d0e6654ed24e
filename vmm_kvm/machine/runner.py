"""vCPU threads: each runs its vCPU until the VM's termination.

Each vCPU has one thread, in KVM_RUN for nearly all of its life. Exits for devices are dispatched
on that thread, under the device's own lock; the other exits go to `on_exit`. `vmm_kvm.primitives`
decides when a vCPU may enter the guest, and when it has to leave it.
"""

import threading
from collections.abc import Callable

from vmm_kvm import primitives
from vmm_kvm.arch.x86.dispatch import Collected, dispatch
from vmm_kvm.bus import Bus
from vmm_kvm.errors import KvmError, RefusedError
from vmm_kvm.kvm.exits import Exit
from vmm_kvm.kvm.vcpu import Vcpu
from vmm_kvm.log import Log
from vmm_kvm.primitives import NoHelpNeeded, Terminated, Vmm

log = Log(__name__)


class Runner:
    """The vCPU threads of one VM.

    `collected`, if any, takes the writes that KVM has collected; see `dispatch`.
    `on_exit(vcpu, exit)` is called on the vCPU's thread for every exit that is not a device
    access, and `on_failure` for an exception that ended a thread: KVM's, or a bug of ours. Neither
    may wait for threads; both may request the VM's termination.
    """

    def __init__(
        self,
        vmm: Vmm,
        vm_id: int,
        pio: Bus,
        mmio: Bus,
        *,
        count: int,
        collected: Collected | None,
        on_exit: Callable[[Vcpu, Exit], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        """Prepare a thread for each of `count` vCPUs; none runs before `start`."""
        self._vmm = vmm
        self._vm_id = vm_id
        self._pio = pio
        self._mmio = mmio
        self._collected = collected
        self._on_exit = on_exit
        self._on_failure = on_failure
        self._count = count
        self.renew()

    def renew(self) -> None:
        """Prepare the threads again; in a forked child, which has none of them."""
        self._threads = [
            threading.Thread(target=self._run, args=(index,), name=f"vcpu{index}")
            for index in range(self._count)
        ]

    def start(self) -> None:
        """Start every vCPU; called once, on the thread that made this object."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End every vCPU thread and wait for it; idempotent. Not for vCPU threads.

        Raises:
            RefusedError: the VM is gone already.
        """
        primitives.request_termination(self._vmm, self._vm_id)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _run(self, index: int) -> None:
        try:
            vcpu = primitives.kvm_vcpu(self._vmm, self._vm_id, index)
            while True:
                reason = primitives.run(self._vmm, self._vm_id, index, enter=self._enter).exit
                if isinstance(reason, Terminated):
                    return
                if not isinstance(reason, NoHelpNeeded):
                    self._on_exit(vcpu, reason)
        except (KvmError, RefusedError) as err:
            self._on_failure(err)
        except Exception as err:
            log.exception("vcpu%d", index)
            self._on_failure(err)

    def _enter(self, vcpu: Vcpu) -> Exit:
        return dispatch(vcpu, self._pio, self._mmio, self._collected)
