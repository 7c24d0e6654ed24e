"""Machines that a VM's process makes, and forgets, while it waits for its VM.

Afterwards it has most of the pages that it needs to itself: a start does not wait for them.
"""

import os
from contextlib import ExitStack
from functools import cache

from vmd.shared.vm_devices import Connections
from vmd.vm.capturing import NO_BOOT, NO_CPUID
from vmd.vm.machine_spec import machine_spec_of
from vmd.vm.receiving import receive
from vmd.vm.sending import manifest_of
from vmd.wire.channel import Fds
from vmd.wire.internal import VmSpec
from vmd.wire.transfers import ReceivedSpec
from vmm_kvm.arch.x86.bios import FirmwareImage
from vmm_kvm.bits import MIB
from vmm_kvm.errors import VmmError
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.machine import Machine
from vmm_kvm.machine.spec import MachineSpec
from vmm_kvm.machine.state import restore, save
from vmm_kvm.memfd import make_constant, make_memory
from vmm_kvm.memory import GuestMemory
from vmm_kvm.primitives import Vmm
from vmm_kvm.snapshot import state as states
from vmm_kvm.snapshot.state import State
from vmm_kvm.snapshot.stream import head

log = Log(__name__)

_NAME = "rehearsal"
_ROM = 4096  # bytes of firmware that never runs
_SPEC = VmSpec(
    id=0,
    name=_NAME,
    memory=MIB,
    cpus=1,
    tty=0,
    ring=1,
    boot=None,
    boot_path=_NAME,
    received=ReceivedSpec(stream=2, manifest="", stays_paused=True, memory=3, is_copy=True),
)


_MACHINE = MachineSpec(image=FirmwareImage(_NAME, bytes(_ROM), _ROM), memory_size=MIB)


@cache
def _left_by_another(kvm: Kvm) -> bytes:
    """Return what a clone continues from, made once: processes forked later have it.

    Raises:
        VmmError, OSError: no machine can be made.
    """
    with Vmm(kvm) as vmm, EventLoop() as loop, _machine(_MACHINE, vmm, loop) as machine:
        machine.pause()
        saved = save(machine)
        state = states.encode(State(saved.parts, saved.blobs))
        return head(manifest_of(machine, _SPEC, NO_BOOT, len(state), NO_CPUID)) + state


def prepare_clones(kvm: Kvm) -> None:
    """Have processes that are forked later rehearse with less work of their own."""
    try:
        _left_by_another(kvm)
    except (VmmError, OSError) as err:  # they find out by themselves
        log.debug("no clones are rehearsed: %s", err)


def rehearse(kvm: Kvm, *, is_clone: bool) -> None:
    """Make a small machine, with `is_clone` one that continues from another, and forget it.

    Raises:
        VmmError, OSError: none can be made.
    """
    left = _left_by_another(kvm) if is_clone else b""
    with Vmm(kvm) as vmm, EventLoop() as loop:
        if not is_clone:
            _machine(_MACHINE, vmm, loop).close()
            return
        with ExitStack() as stack:
            ram_fd = make_memory(_NAME, MIB)
            stack.callback(os.close, ram_fd)
            stream = make_constant(_NAME, (left,))
            received = receive(stream, _SPEC, kvm, is_private=True, ram_fd=ram_fd)
            stack.callback(received.memory.close)
            spec = machine_spec_of(
                _SPEC, Fds([]), Connections((), ()), stack, received=received, lend=os.close
            )
            clone = stack.enter_context(_machine(spec, vmm, loop, received.memory))
            restore(clone, received.state)
            clone.become_another()


def _machine(
    spec: MachineSpec, vmm: Vmm, loop: EventLoop, memory: GuestMemory | None = None
) -> Machine:
    return Machine(
        spec,
        vmm,
        loop,
        transmit=lambda _data: None,
        on_receive_room=lambda: None,
        on_outcome=lambda _outcome: None,
        is_restored=memory is not None,
        memory=memory,
    )
