"""The state of a whole machine: one walk over its parts, to save and to restore.

`save` returns all state that a guest can observe, except RAM and disks; `restore` gives it to a new
machine. Untrusted input is checked: types and ranges by the records, the rest by each part.

Order: devices come before KVM's state. They drive their interrupt lines, and then the interrupt
controllers get their saved state, so that no edge is taken twice. Device threads start last,
with `Machine.resume`: a message that they send reaches a local APIC that is there.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from vmm_kvm.arch.x86.kvm_state import (
    ClockPolicy,
    ClockRecord,
    IrqchipRecord,
    KvmRecord,
    PitRecord,
    VcpuRecord,
)
from vmm_kvm.errors import Refusal, RefusedError, StateError
from vmm_kvm.state import AnyRecord, decode, encode

if TYPE_CHECKING:
    from vmm_kvm.machine.machine import Machine
    from vmm_kvm.state import Json

T = TypeVar("T", bound=AnyRecord)
_BLK = "/blk"  # how the names of such parts end


class MachineState(NamedTuple):
    """The state of a machine without its RAM."""

    parts: "dict[str, dict[str, Json]]"
    """By the names of the parts, in the order of the walk; fit for JSON."""
    blobs: dict[str, bytes]
    """By "part/field": what stays bytes."""


def save(machine: "Machine") -> MachineState:
    """Return the state of a paused machine; on its event loop's thread. It changes nothing.

    Raises:
        RefusedError: the machine is not paused, or has a TPM.
        KvmError: KVM refused.
    """
    if machine.spec.tpm is not None:
        raise RefusedError(Refusal.EBUSY, "a TPM keeps its secrets to itself: it cannot be saved")
    state = MachineState({}, {})
    record = machine.save_kvm()
    for part in machine.parts():
        _add(state, part.name, part.save())
    for name, kvm_part in _kvm_parts(record):
        _add(state, name, encode(kvm_part))
    return state


def restore(
    machine: "Machine", state: MachineState, policy: ClockPolicy = ClockPolicy.FROZEN
) -> None:
    """Continue from `state` in a machine that was made for it; see `Machine`, `is_restored`.

    Its RAM is filled by the caller. After an error the machine is of no use.

    Raises:
        StateError: the state is of another machine, or cannot be one.
        RefusedError: the machine runs.
        KvmError: the kernel or the processor does not take the state.
    """
    parts = [part for part in machine.parts() if not _was_elsewhere(part.name, state)]
    vcpus = [f"vcpu{index}" for index in range(machine.spec.cpus)]
    _check_names([*(part.name for part in parts), "clock", *vcpus, "irqchip", "pit"], state)
    for part in parts:
        part.restore(state.parts[part.name], _blobs(state, part.name))
    machine.restore_kvm(
        KvmRecord(
            clock=_decode(ClockRecord, state, "clock"),
            vcpus=tuple(_decode(VcpuRecord, state, name) for name in vcpus),
            irqchip=_decode(IrqchipRecord, state, "irqchip"),
            pit=_decode(PitRecord, state, "pit"),
        ),
        policy,
    )


def _was_elsewhere(name: str, state: MachineState) -> bool:
    """Tell whether a part is that of a disk which another process served: no such has a part.

    What a guest sees of it is in the state of its function.
    """
    return name.endswith(_BLK) and name not in state.parts


def _kvm_parts(record: KvmRecord) -> Iterator[tuple[str, AnyRecord]]:
    yield "clock", record.clock
    for index, vcpu in enumerate(record.vcpus):
        yield f"vcpu{index}", vcpu
    yield "irqchip", record.irqchip
    yield "pit", record.pit


def _add(state: MachineState, name: str, saved: "tuple[dict[str, Json], dict[str, bytes]]") -> None:
    assert name not in state.parts, f"two parts are {name}"
    fields, blobs = saved
    state.parts[name] = fields
    for field, data in blobs.items():
        state.blobs[f"{name}/{field}"] = data


def _check_names(wanted: list[str], state: MachineState) -> None:
    odd = set(wanted) ^ state.parts.keys()
    if odd:
        name = min(odd)
        raise StateError(f"{name!r:.64}: {'missing' if name in wanted else 'not in this machine'}")
    for name in state.blobs:
        if name.rpartition("/")[0] not in state.parts:
            raise StateError(f"blob {name!r:.64}: not in this machine")


def _blobs(state: MachineState, name: str) -> Mapping[str, bytes]:
    start = f"{name}/"
    return {
        key.removeprefix(start): data
        for key, data in state.blobs.items()
        if key.rpartition("/")[0] == name
    }


def _decode(kind: type[T], state: MachineState, name: str) -> T:
    try:
        return decode(kind, state.parts[name], _blobs(state, name))
    except StateError as err:
        raise StateError(f"{name}: {err}") from err
