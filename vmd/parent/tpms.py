"""TPMs of VMs: where each keeps its secrets, and the tpm process that executes swtpm for it.

The secrets lie in a directory by the VM's name and owner, and outlive the VM: it comes back under
its name, after a reboot, a stop, or the daemon's end. swtpm is a user whom no other process has at
that time. Its directory is open to all, in one that only this process's user can enter: swtpm has
it as its working directory, and makes itself copies. So nothing has to be given away, for which
root would need CAP_CHOWN.

Source: swtpm(8)
"""

import os
import socket
import stat
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import count

from vmd.parent.errors import ResourceError
from vmd.parent.peer import Peer
from vmd.rules.policy import Users
from vmd.rules.vm import Vm
from vmd.wire.channel import Fds
from vmd.wire.messages import ErrorCode
from vmd.wire.tpm import (
    DIRECTORY_MODE,
    FILE_MODE,
    PARENT_AND_TPM,
    ParentToTpm,
    StartTpm,
    TpmToParent,
)
from vmm_kvm.loop import EventLoop

TPMS_PER_USER = 64
"""Directories of secrets, some 10 KiB each, that are kept for the VMs of an ordinary user."""
_FILES_MAX = 16
"""Of one TPM; swtpm has three or four."""
_MODE = 0o700
_OPEN = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Tpms:
    """The TPMs of all VMs; for one thread."""

    def __init__(
        self, loop: EventLoop, state: str | None, users: Users, uids: Sequence[int] = ()
    ) -> None:
        """Begin without any.

        Their secrets are below the directory `state`, if there is one. Each swtpm becomes one of
        `uids`; without any they all stay this process's user.
        """
        self._directory = None if state is None else f"{state}/tpm"
        self._users = users
        self._numbers = count(1)
        self._free = deque(uids)
        self._is_separate = bool(uids)
        self._used: dict[int, tuple[str, int]] = {}
        """State and uid of each swtpm that has not ended, by its number."""
        self.peer: Peer[ParentToTpm, TpmToParent] = Peer("tpm", PARENT_AND_TPM, loop, self._take)

    def open(self, vm: Vm, cgroup: int | None) -> tuple[int, int]:
        """Start a VM's TPM; returns its channels, of control and of commands: the caller's.

        `cgroup` is a descriptor for joining the control group of the VM's devices, if there is one;
        it stays the caller's.

        Raises:
            ResourceError: there can be none.
            OSError: the host has no descriptors left.
        """
        from shutil import which  # noqa: PLC0415 - every child would inherit all that it imports

        if which("swtpm") is None:
            raise ResourceError(ErrorCode.EINVAL, "tpm: swtpm is not installed")
        if self._directory is None:
            raise ResourceError(ErrorCode.EIO, "tpm: no directory for secrets: HOME is not set")
        if not self.peer.is_there:
            text = "tpm: the process that starts swtpm has ended: restart vmd"
            raise ResourceError(ErrorCode.EAGAIN, text)
        ending = f"-{vm.config.owner.uid or 0}"
        state = f"{vm.name}{ending}"
        with Fds() as passed, Fds() as ours:
            try:
                directory = passed.add(self._open_state(vm, state, ending))
            except OSError as err:
                text = f"tpm: {self._directory}/{state}: {err.strerror}"
                raise ResourceError(ErrorCode.EIO, text) from err
            uid = self._claim(state)
            if uid:
                _open_up(directory, f"{self._directory}/{state}")
            for _ in range(2):
                one, other = socket.socketpair()
                ours.add(one.detach())
                passed.add(other.detach())
            if cgroup is not None:
                passed.add(os.dup(cgroup))
            number = next(self._numbers)
            self._used[number] = state, uid
            if uid in self._free:
                self._free.remove(uid)
            order = StartTpm(number=number, vm=vm.name, state=state, uid=uid)
            self.peer.send(order, passed.take_all())
            control, data = ours.take_all()
            return control, data

    def _take(self, message: TpmToParent, _fds: Fds) -> None:
        state, uid = self._used.pop(message.number, ("", 0))
        if uid and (state, uid) not in self._used.values():
            self._free.append(uid)

    def _claim(self, state: str) -> int:
        """Return the uid for the swtpm of a state: that of one before it, which still ends."""
        if not self._is_separate:
            return 0
        for used, uid in self._used.values():
            if used == state:
                return uid
        if not self._free:
            raise ResourceError(ErrorCode.EAGAIN, "tpm: all uids are in use (vmd --uids)")
        return self._free[0]

    def _open_state(self, vm: Vm, state: str, ending: str) -> int:
        """Return a descriptor of the directory of a TPM's secrets, made if it is missing."""
        assert self._directory is not None
        path = f"{self._directory}/{state}"
        os.makedirs(self._directory, _MODE, exist_ok=True)  # noqa: PTH103 - names alone
        os.chmod(self._directory, _MODE)  # noqa: PTH101 - the same
        with suppress(FileNotFoundError):
            return os.open(path, _OPEN | os.O_DIRECTORY)
        self._check_room(vm, ending)
        os.mkdir(path, _MODE)  # noqa: PTH102 - the same
        return os.open(path, _OPEN | os.O_DIRECTORY)

    def _check_room(self, vm: Vm, ending: str) -> None:
        """Raise ResourceError if an ordinary user has the maximum number of TPMs."""
        if vm.requester in self._users.administrators:
            return
        kept = sum(name.endswith(ending) for name in os.listdir(self._directory))  # noqa: PTH208
        if kept >= TPMS_PER_USER:
            text = f"tpm: limit of {TPMS_PER_USER} VMs of one user whose TPMs are kept"
            text += f": root can remove some from {self._directory}"
            raise ResourceError(ErrorCode.EPERM, text)


def _open_up(directory: int, path: str) -> None:
    """Let the next swtpm use a directory of secrets, which another one has left.

    Nothing is followed out of it: a swtpm that a guest has taken over may have left anything.
    """
    own = f"/proc/self/fd/{directory}"
    names = os.listdir(own)  # noqa: PTH208 - names alone
    for name in names[: _FILES_MAX + 1]:
        fd = os.open(name, _OPEN, dir_fd=directory)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or len(names) > _FILES_MAX:
                raise ResourceError(ErrorCode.EIO, f"tpm: {path}: not only a TPM's files")
            if stat.S_IMODE(found.st_mode) != FILE_MODE:
                os.chmod(f"/proc/self/fd/{fd}", FILE_MODE)  # noqa: PTH101 - a descriptor's
        finally:
            os.close(fd)
    os.chmod(own, DIRECTORY_MODE)  # noqa: PTH101 - the same
