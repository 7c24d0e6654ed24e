"""Detecting changes of disks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmm_kvm.errors import SnapshotError
from vmm_kvm.snapshot.generations import (
    Generation,
    check_generations,
    take_generations,
    with_generations,
)
from vmm_kvm.snapshot.state import State

STATE = State({"uart0": {"version": 1}}, {"vcpu0/regs": b"x"})
WAS = Generation(8192, 1_700_000_000_000_000_001, 42)


def test_generations_travel_with_the_state() -> None:
    """Generations are read back with their places, and the state is unchanged."""
    with_them = with_generations(STATE, {0: WAS, 2: WAS})
    assert take_generations(with_them, 3) == (STATE, {0: WAS, 2: WAS})
    assert take_generations(STATE, 3) == (STATE, {})


@pytest.mark.parametrize("field", [{"size": -1}, {"size": "x"}, {"number": None}, {"odd": 1}])
def test_what_is_no_generation_is_refused(field: dict[str, int]) -> None:
    """A malformed generation is refused: a state may come from anywhere."""
    with_it = with_generations(STATE, {0: WAS})
    parts = {**with_it.parts, "image0": {**with_it.parts["image0"], **field}}
    with pytest.raises(SnapshotError, match="image0: "):
        take_generations(State(parts, STATE.blobs), 1)


@pytest.mark.parametrize(
    ("now", "is_same"),
    [
        (WAS, True),
        (WAS._replace(changed_ns=WAS.changed_ns + 1), False),
        (WAS._replace(size=4096), False),
        (WAS._replace(number=43, changed_ns=7), True),  # a copy
        (WAS._replace(number=43, size=4096), False),
    ],
)
def test_a_disk_that_has_changed_is_refused(now: Generation, is_same: bool) -> None:
    """Another time or size is a change; for a copy only the size is known."""
    if is_same:
        check_generations(["/vm/a", "/vm/b"], {1: WAS}, {0: WAS, 1: now})
        return
    with pytest.raises(SnapshotError, match="disk /vm/b: it has changed since the VM was written"):
        check_generations(["/vm/a", "/vm/b"], {1: WAS}, {1: now})


def test_a_file_that_is_written_has_another(tmp_path: Path) -> None:
    """A write gives a file another generation; a read does not."""
    path = tmp_path / "disk"
    path.write_bytes(b"one")
    with path.open("r+b") as file:
        before = Generation.of(file.fileno())
        assert file.read() == b"one"
        assert Generation.of(file.fileno()) == before
        os.utime(file.fileno(), ns=(0, before.changed_ns + 1))
        assert Generation.of(file.fileno()) != before
