"""VMs that are being written: into a client's stream or file, or into the store of snapshots."""

import os
from collections.abc import Callable, Sequence

from vmd.parent.snapshots import NewSnapshot, SnapshotStore, StoreError
from vmd.parent.status import TimedLoop
from vmd.rules import vm_state
from vmd.rules.actions import LookIntoStore
from vmd.rules.vm import Sink, Vm
from vmd.wire.leaving import CancelSendVm, SendVm
from vmd.wire.messages import AnyAnswer, Done, Failed
from vmd.wire.transfers import (
    OpenSnapshot,
    RemoveSnapshot,
    SentBoot,
    SnapshotList,
    SnapshotOpened,
    Snapshots,
)
from vmm_kvm.clock import NANOSECONDS

LOOK_NS = NANOSECONDS
"""Between two looks at the sizes of snapshots that are being written."""
EXCESS_MAX = 1 << 30
"""Bytes that a VM process may write after it was told to write no more; then it is killed."""

TellVm = Callable[[int, SendVm | CancelSendVm, Sequence[int]], None]
"""Says something to a VM process, by the VM's id; takes ownership of the descriptors."""


class Sendings:
    """VMs that are being written, on the event loop's thread."""

    def __init__(
        self,
        loop: TimedLoop,
        store: SnapshotStore,
        tell_vm: TellVm,
        kill_vm: Callable[[int, str], None],
        *,
        excess_max: int = EXCESS_MAX,
    ) -> None:
        """Begin with nothing; `kill_vm` ends a VM for a reason, by its id."""
        self._excess_max = excess_max
        self._loop = loop
        self._store = store
        self._tell_vm = tell_vm
        self._kill_vm = kill_vm
        self._new: dict[int, NewSnapshot] = {}
        self._refused: dict[int, tuple[StoreError, int]] = {}
        """Why those are not to be written any more that were told so, and how large they were."""
        self._timer = loop.timer(self._look)

    def begin(self, vm: Vm, effect: vm_state.SendState) -> vm_state.SendFailed | None:
        """Have a VM written into its sink; returns why that cannot be."""
        sink, vm.sink = vm.sink, None
        assert sink is not None
        fd = sink.fd
        if fd is None:
            try:
                new = self._store.begin(sink.uid, sink.name)
            except StoreError as err:
                return vm_state.SendFailed(err.code, str(err))
            self._new[vm.id] = new
            self._arm()
            fd = os.dup(new.fd)
        command = _command(vm, effect, sink)
        self._tell_vm(vm.id, command, (fd,) if sink.replies is None else (fd, sink.replies))
        return None

    def end(self, vm_id: int) -> vm_state.Sent | vm_state.SendFailed:
        """Account for a VM of which all is written."""
        self._refused.pop(vm_id, None)
        new = self._new.pop(vm_id, None)
        if new is None:
            return vm_state.Sent()
        try:
            new.publish()
        except StoreError as err:
            return vm_state.SendFailed(err.code, str(err))
        finally:
            new.close()
        return vm_state.Sent()

    def forget(self, vm_id: int) -> StoreError | None:
        """Account for a VM of which not all is written; returns the reason, if it is ours."""
        new = self._new.pop(vm_id, None)
        if new:
            new.close()
        return self._refused.pop(vm_id, (None, 0))[0]

    def _arm(self) -> None:
        self._timer.arm(self._loop.monotonic_ns() + LOOK_NS)

    def _look(self) -> None:
        """Have no more written for a user than there is room for, all VMs together."""
        sizes = {vm_id: new.size for vm_id, new in self._new.items()}
        for vm_id, new in tuple(self._new.items()):
            own = sum(sizes[other] for other, each in self._new.items() if each.uid == new.uid)
            try:
                self._store.check_room(new.uid, own)
            except StoreError as err:
                if vm_id not in self._refused:
                    self._refused[vm_id] = err, sizes[vm_id]
                    self._tell_vm(vm_id, CancelSendVm(), ())
                elif sizes[vm_id] > self._refused[vm_id][1] + self._excess_max:
                    self._kill_vm(vm_id, f"it goes on writing a snapshot: {err}")
        if self._new:
            self._arm()

    def answer(self, question: LookIntoStore) -> tuple[AnyAnswer, Sequence[int]]:
        """Return the answer to a user, with descriptors."""
        (_, serial), uid, request = question
        try:
            match request:
                case Snapshots():
                    return SnapshotList(serial=serial, snapshots=self._store.list(uid)), ()
                case OpenSnapshot(snapshot=name):
                    return SnapshotOpened(serial=serial), (self._store.open(uid, name),)
                case RemoveSnapshot(snapshot=name):
                    self._store.remove(uid, name)
        except StoreError as err:
            return Failed(serial=serial, code=err.code, message=str(err)), ()
        return Done(serial=serial), ()


def _command(vm: Vm, effect: vm_state.SendState, sink: Sink) -> SendVm:
    config = vm.config
    return SendVm(
        keeps_running=effect.keeps_running,
        handover=effect.handover,
        is_snapshot=sink.is_snapshot,
        keeps_disks=sink.keeps_disks,
        uid=config.owner.uid,
        gid=config.owner.gid,
        boot=SentBoot(
            image=config.boot,
            firmware=config.firmware,
            initrd=config.initrd,
            append=config.append,
        ),
    )
