"""Guests for the primitives' tests: their memory, their registers, a thread that runs them."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable

from tests import guests
from vmm_kvm import primitives
from vmm_kvm.arch.x86.registers import Registers, SegmentRegister
from vmm_kvm.errors import KvmError, RefusedError
from vmm_kvm.primitives import NoHelpNeeded, RunResult, VcpuState, Vmm
from vmm_kvm.vm_params import CreateParams, MemoryRange

DEADLINE_S = 20.0
CODE_SEGMENT = SegmentRegister(0, 0, 0xFFFF, 0x9B)

mapped: list[Ram] = []
"""Guest memory belongs to the test: it must stay mapped as long as its VM lives."""


class Ram:
    """Memory of this process for a guest."""

    def __init__(self, size: int = guests.RAM_SIZE) -> None:
        self.memory = mmap.mmap(-1, size)
        self.size = size
        self.va = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        mapped.append(self)

    def params(self, *, ncpus: int = 1, name: str = "test") -> CreateParams:
        """Return the parameters of a VM with this memory."""
        return CreateParams(ranges=[MemoryRange(0, self.va, self.size)], ncpus=ncpus, name=name)

    def put(self, address: int, data: bytes) -> None:
        """Copy `data` to `address`."""
        self.memory[address : address + len(data)] = data


def entry(vmm: Vmm, vm_id: int, vcpu_id: int = 0) -> Registers:
    """Return the registers of a vCPU after reset, but about to run CODE in segment 0."""
    registers = primitives.read_registers(vmm, vm_id, vcpu_id)
    assert registers.gprs is not None
    assert registers.segments is not None
    return registers._replace(
        gprs={**registers.gprs, "rip": guests.CODE, "rsp": guests.STACK},
        segments={**registers.segments, "cs": CODE_SEGMENT},
    )


def create(vmm: Vmm, code: bytes, *, ncpus: int = 1, name: str = "test") -> tuple[int, Ram]:
    """Create a VM whose vCPUs are about to run `code`."""
    ram = Ram()
    ram.put(guests.CODE, code)
    vm_id = primitives.create(vmm, ram.params(ncpus=ncpus, name=name))
    for vcpu_id in range(ncpus):
        primitives.reset_vcpu(vmm, vm_id, vcpu_id, entry(vmm, vm_id, vcpu_id))
    return vm_id, ram


def state(vmm: Vmm, vm_id: int, vcpu_id: int = 0) -> VcpuState:
    """Return the state of a vCPU of this table."""
    return vmm.vms[vm_id].vcpus[vcpu_id].state


class Runner:
    """A thread that runs a vCPU until `run` needs help."""

    def __init__(self, vmm: Vmm, vm_id: int, vcpu_id: int = 0, *, is_paused: bool = False) -> None:
        self.results: list[RunResult] = []
        self.errors: list[Exception] = []
        self._entered = threading.Event()
        self._arguments = (vmm, vm_id, vcpu_id)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        assert self._entered.wait(DEADLINE_S)
        if is_paused:
            self.wait_until(lambda: vmm.vms[vm_id].vcpus[vcpu_id].is_waiting)
        else:
            self.wait_until(lambda: state(vmm, vm_id, vcpu_id) is VcpuState.RUNNING)

    def _run(self) -> None:
        self._entered.set()
        try:
            while True:
                result = primitives.run(*self._arguments)
                self.results.append(result)
                if not isinstance(result.exit, NoHelpNeeded):
                    return
        except (RefusedError, KvmError) as err:
            self.errors.append(err)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until the table meets a condition."""
        vmm = self._arguments[0]
        with vmm.changed:
            while not condition():  # no notification tells of an entry into the guest
                assert self.thread.is_alive()
                vmm.changed.wait(0.01)

    def join(self) -> RunResult:
        """Wait for the end; return the last result."""
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        assert self.errors == []
        return self.results[-1]
