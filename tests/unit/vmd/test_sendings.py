"""VMs that are written into the store: they stop where their user's room ends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tests.unit.vmd.far import run_until
from vmd.config.model import Limits, Owner, VmConfig
from vmd.parent.sendings import Sendings
from vmd.parent.snapshots import SnapshotStore
from vmd.rules import vm_state
from vmd.rules.policy import Users
from vmd.rules.vm import Sink, Vm
from vmd.wire.channel import Fds
from vmd.wire.leaving import CancelSendVm, SendVm
from vmm_kvm.loop import EventLoop

LIMIT = 64 << 10


def vm(number: int) -> Vm:
    """Return a VM that is to be written into the store."""
    config = VmConfig(name=f"vm{number}", owner=Owner(os.getuid(), None))
    made = Vm(config, vm_state.VmState(id=number), os.getuid())
    made.sink = Sink(is_snapshot=True, uid=os.getuid(), name=f"s{number}")
    return made


def test_what_is_being_written_counts(tmp_path: Path) -> None:
    """Snapshots of one user that are written at a time end at its limit; then a VM does."""
    users = Users(frozenset(), lambda _uid, _gid: False)
    store = SnapshotStore(str(tmp_path / "store"), users, lambda: Limits(storage=LIMIT))
    files: dict[int, int] = {}
    cancelled: list[int] = []
    killed: dict[int, str] = {}

    def tell(vm_id: int, command: SendVm | CancelSendVm, fds: Sequence[int]) -> None:
        if isinstance(command, SendVm):
            files[vm_id] = os.dup(fds[0])
        else:
            cancelled.append(vm_id)
        Fds(fds).close()

    with EventLoop() as loop:
        sendings = Sendings(loop, store, tell, killed.__setitem__, excess_max=LIMIT)
        for number in (1, 2):
            assert sendings.begin(vm(number), vm_state.SendState(keeps_running=True)) is None
            os.write(files[number], b"x" * (LIMIT // 2))
        os.write(files[1], b"x" * LIMIT)
        run_until(loop, lambda: set(cancelled) == {1, 2})
        assert not killed
        refused = sendings.forget(2)
        assert "limit of 64.0K storage" in str(refused)
        os.write(files[1], b"x" * 2 * LIMIT)
        run_until(loop, lambda: 1 in killed)
        assert "it goes on writing" in killed[1]
        sendings.forget(1)
    for fd in files.values():
        os.close(fd)
    assert store.list(os.getuid()) == ()
