"""The VM's clock, as a guest reads it, and as a clone and a restored machine have it."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from tests import guests
from tests.kvm.test_clone import in_child, status_of
from tests.kvm.test_state import bench
from tests.vmctl_driver import VMCTL
from vmm_kvm.arch.x86.kvm_state import ClockPolicy
from vmm_kvm.arch.x86.layout import VM_CLOCK_ADDRESS
from vmm_kvm.devices.vm_clock import VmClock, VmClockState
from vmm_kvm.machine import state
from vmm_kvm.machine.machine import Machine

pytestmark = pytest.mark.kvm

_SIZE, _GDT_AT, _LIMIT = 64 << 10, 0x100, 0xFFFF
_BASE = (1 << 32) - _SIZE
_READ = 12
_END_STATUS = 0x07 << 1 | 1
_CODE = b"".join(
    (
        guests.REACH_ALL,
        b"\x66\xbe" + struct.pack("<I", VM_CLOCK_ADDRESS),  # mov $address, %esi
        bytes.fromhex("b9") + struct.pack("<H", _READ),  # mov $12, %cx
        bytes.fromhex("baf803"),  # mov $0x3f8, %dx
        bytes.fromhex("678a06"),  # next: mov (%esi), %al
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("6646"),  # inc %esi
        bytes.fromhex("e2f8"),  # loop next
        bytes.fromhex("b007e6f4"),  # mov $7, %al; out %al, $0xf4
    )
)
# A pointer to the table, then at its third place a flat segment for data.
_GDT = struct.pack("<HI2x", 0x17, _BASE + _GDT_AT) + bytes(8) + bytes.fromhex("ffff00000093cf00")


def test_a_guest_reads_it(tmp_path: Path) -> None:
    """Its page is where ACPI says, and begins as the specification says."""
    image = bytearray(_SIZE)
    image[: len(_CODE)] = _CODE
    image[_GDT_AT : _GDT_AT + len(_GDT)] = _GDT
    image[-16:-11] = b"\xe9\x0d\x00".ljust(5, b"\x90")  # jmp 0, around 64 KiB
    path = tmp_path / "reader.bin"
    path.write_bytes(image)
    run: list[str | Path] = [VMCTL, "run", "-b", path, "-m", "4M", "--timeout", "60"]
    done = subprocess.run(run, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (done.stderr, done.returncode) == (b"", _END_STATUS)
    assert done.stdout == b"VCLK" + struct.pack("<IHBB", 4096, 1, 0xFF, 0)


def test_a_clone_is_a_copy() -> None:
    """Its generation and its marker change; the source's do not."""
    with bench() as stand, stand.machine() as machine:
        machine.start()
        assert stand.says(b"selftest: ready")
        machine.pause()
        before = _clock(machine)

        def look() -> None:
            machine.pause()
            now = _clock(machine)
            assert now.generation != before.generation
            assert now.disruptions != before.disruptions

        assert status_of(in_child(stand, machine, look)) == 0
        assert _clock(machine) == before


def test_a_moved_machine_is_no_copy() -> None:
    """Its marker changes alone."""
    with bench() as stand:
        with stand.machine() as machine:
            machine.start()
            assert stand.says(b"selftest: ready")
            machine.pause()
            before, saved = _clock(machine), state.save(machine)
        with stand.machine(is_restored=True) as machine:
            state.restore(machine, saved, ClockPolicy.NOW)
            assert _clock(machine) == before
            machine.become_another(is_copy=False)
            now = _clock(machine)
        assert now.generation == before.generation
        assert now.disruptions != before.disruptions


def _clock(machine: Machine) -> VmClockState:
    (part,) = (part.device for part in machine.parts() if isinstance(part.device, VmClock))
    return part.save()
