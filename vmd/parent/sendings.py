"""VMs that are being written: into a client's stream or file, or into the store of snapshots."""

import os
from collections.abc import Callable, Sequence

from vmd.parent.snapshots import NewSnapshot, SnapshotStore, StoreError
from vmd.rules import vm_state
from vmd.rules.actions import LookIntoStore
from vmd.rules.vm import Sink, Vm
from vmd.wire.leaving import SendVm
from vmd.wire.messages import AnyAnswer, Done, Failed
from vmd.wire.transfers import (
    OpenSnapshot,
    RemoveSnapshot,
    SentBoot,
    SnapshotList,
    SnapshotOpened,
    Snapshots,
)

TellVm = Callable[[int, SendVm, Sequence[int]], None]
"""Says something to a VM process, by the VM's id; takes ownership of the descriptors."""


class Sendings:
    """The VM that is being written, on the event loop's thread."""

    def __init__(self, store: SnapshotStore, tell_vm: TellVm) -> None:
        """Begin with nothing."""
        self._store = store
        self._tell_vm = tell_vm
        self._new: dict[int, NewSnapshot] = {}

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
            fd = os.dup(new.fd)
        command = _command(vm, effect, sink)
        self._tell_vm(vm.id, command, (fd,) if sink.replies is None else (fd, sink.replies))
        return None

    def end(self, vm_id: int) -> vm_state.Sent | vm_state.SendFailed:
        """Account for a VM of which all is written."""
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

    def forget(self, vm_id: int) -> None:
        """Account for a VM of which not all is written."""
        new = self._new.pop(vm_id, None)
        if new:
            new.close()

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
