"""The captured state of a VM, for its clones: checked, and kept while it is needed."""

import fcntl
import os
import weakref
from collections.abc import Sequence
from contextlib import ExitStack

from vmd.rules.vm import Captured, Inherited, Passed, Vm
from vmd.wire.channel import ChannelError, Fds
from vmd.wire.internal import VmSpec
from vmm_kvm.memfd import ALL_SEALS, SIZE_SEALS


class CaptureError(Exception):
    """There is no state for clones; the message is one line."""


def keep(vm: Vm, fds: Fds) -> Captured:
    """Take the state and RAM that a VM's process has handed over.

    Both are opened anew, for reading alone: a clone can change neither. Nothing is opened but
    memory whose size is sealed, since it is the VM's process which says what it is.

    Raises:
        CaptureError: it is not as it has to be, or this process has no descriptors left.
    """
    with ExitStack() as stack:
        try:
            state = _reopened(fds, 0, ALL_SEALS, stack)
            memory = _reopened(fds, 1, SIZE_SEALS, stack)
            inherited = vm.lent or _inherited(vm.files)
        except (OSError, ChannelError) as err:
            raise CaptureError(str(err)) from err
        stack.pop_all()
    captured = Captured(state, memory, inherited)
    weakref.finalize(captured, _close, (state, memory))
    return captured


def _reopened(fds: Fds, at: int, seals: int, stack: ExitStack) -> int:
    theirs = fds.take(at)
    try:
        try:
            is_sealed = fcntl.fcntl(theirs, fcntl.F_GET_SEALS) & seals == seals
        except OSError:  # it is no memory
            is_sealed = False
        if not is_sealed:
            raise CaptureError("its process hands over what can be changed")
        fd = open_again(theirs)
    finally:
        os.close(theirs)
    stack.callback(os.close, fd)
    return fd


def open_again(fd: int) -> int:
    """Return another open file description of memory, for reading; the caller's.

    It has a file offset of its own.

    Raises:
        OSError: this process has no descriptors left.
    """
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def lend(vm: Vm, spec: VmSpec, fds: Sequence[int]) -> Inherited:
    """Return what clones of a template have of its files, all of its disks among it.

    A lock of an image goes with its descriptor: nobody else writes to it as long as a clone is
    there.

    Raises:
        OSError: this process has no descriptors left.
    """
    passed = vm.files or Passed(uid=vm.requester)
    lent = passed._replace(
        disks=tuple(tuple(fds[at] for at in disk.chain) for disk in spec.disks),
        formats=tuple(disk.formats for disk in spec.disks),
        is_judged=True,
    )
    inherited = _inherited(lent)
    assert inherited
    return inherited


def _inherited(passed: Passed | None) -> Inherited | None:
    """Return files of a VM's that its clones boot from again, and have as disks."""
    if passed is None:
        return None
    with ExitStack() as stack:

        def dup(fd: int) -> int:
            own = os.dup(fd)
            stack.callback(os.close, own)
            return own

        own = passed._replace(
            kernel=None if passed.kernel is None else dup(passed.kernel),
            initrd=tuple(map(dup, passed.initrd)),
            cdrom=None if passed.cdrom is None else dup(passed.cdrom),
            disks=tuple(tuple(map(dup, chain)) for chain in passed.disks),
            shares=(),  # no VM with any is cloned
            stream=None,
        )
        stack.pop_all()
    inherited = Inherited(own)
    weakref.finalize(inherited, _close, tuple(own.fds))
    return inherited


def _close(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)
