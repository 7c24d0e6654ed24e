"""A control group for each running VM: limits of its processes together.

The daemon needs a cgroup that is its own, as a service manager delegates one: only root's daemon
looks for it, and takes none with other processes in it. There, it moves into `vmd`, because a group
that gives controllers to others has no processes. A VM has `vm-N` beside that, with two groups
below:

    vm-N            cpu.max, pids.max
    vm-N/guest      memory.max; the VM's process
    vm-N/devices    its device processes, whose page cache does not count as the guest's memory

N counts the groups. The next VM's exists before it starts: the processes that wait for a task are
in it already, because the kernel takes long to move a process. It gets its limits when a VM has it.

Processes join by a descriptor that they are handed, which the kernel allows because root has opened
it. The next daemon removes empty groups that a killed one has left.

Source: cgroups(7); Linux Documentation/admin-guide/cgroup-v2.rst; systemd's CGROUP_DELEGATION
"""

import os
from collections.abc import Iterable
from itertools import count
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vmd.confine.sandbox import TASKS_MAX
from vmm_kvm.log import Log

log = Log(__name__)

OURS = "vmd"
"""Name of the group of the daemon's own processes."""
_PREFIX = "vm-"
_BELOW = _GUEST, _DEVICES = "guest", "devices"
_WANTED = ("cpu", "memory", "pids")
_PERIOD_US = 100_000
_MARGIN = 256 << 20
_MARGIN_SHARE = 64
_PROCS = "cgroup.procs"
_CONTROLLED = "cgroup.subtree_control"


class NoCgroupsError(Exception):
    """There are no control groups for VMs; one line says why."""


class VmCgroup(NamedTuple):
    """Descriptors through which a VM's processes join their groups; the holder owns them."""

    guest: int
    devices: int
    number: int
    """Of the groups."""


def memory_max(memory: int) -> int:
    """Return the memory limit of a VM's process, in bytes, for a guest with `memory` bytes.

    Besides the guest's RAM, it has an interpreter, an unpacked kernel, and what KVM needs to map
    the RAM, which grows with that.
    """
    return memory + _MARGIN + memory // _MARGIN_SHARE


def cpu_max(percent: int) -> str:
    """Return the contents of cpu.max for a percentage of one processor."""
    return f"{percent * _PERIOD_US // 100} {_PERIOD_US}"


class Cgroups:
    """The groups of all VMs."""

    def __init__(self, base: Path, controllers: Iterable[str]) -> None:
        """Make groups below `base`, which has these controllers for them."""
        self._base = base
        self.controllers = frozenset(controllers)
        self._groups: dict[int, Path] = {}
        self._spare: tuple[int, Path] | None = None
        self._numbers = count(1)
        self._left = {path for path in base.iterdir() if path.name.startswith(_PREFIX)}
        self.tidy()

    def open(self, vm_id: int, memory: int, cpu_limit: int | None) -> VmCgroup:
        """Give a VM its groups, with their limits; they last until `remove`.

        Raises:
            OSError: the kernel refused.
        """
        number, path = self._spare or self._make()
        self._spare = None
        self._groups[vm_id] = path
        if "cpu" in self.controllers and cpu_limit is not None:
            _write(path / "cpu.max", cpu_max(cpu_limit))
        if "memory" in self.controllers:
            _write(path / _GUEST / "memory.max", str(memory_max(memory)))
        return _opened(number, path)

    def spare(self) -> VmCgroup | None:
        """Make the groups that the next VM gets; None if they exist, or the kernel refuses."""
        self.tidy()
        if self._spare is not None:
            return None
        try:
            self._spare = self._make()
            return _opened(*self._spare)
        except OSError as err:  # a start tries it again, and fails for that reason
            log.debug("no control group ahead: %s", err)
            return None

    def drop_spare(self) -> None:
        """Remove the next VM's groups, as soon as they are empty."""
        if self._spare is not None:
            self._left.add(self._spare[1])
            self._spare = None
        self.tidy()

    def remove(self, vm_id: int) -> None:
        """Remove a VM's groups, if any, as soon as they are empty."""
        path = self._groups.pop(vm_id, None)
        if path is not None:
            self._left.add(path)
            self.tidy()

    def _make(self) -> tuple[int, Path]:
        """Make groups of a new number, which no killed daemon has left."""
        number, path = next(
            (number, path)
            for number in self._numbers
            if not (path := self._base / f"{_PREFIX}{number}").exists()
        )
        path.mkdir()
        try:
            if "pids" in self.controllers:
                _write(path / "pids.max", str(TASKS_MAX))
            if "memory" in self.controllers:
                _write(path / _CONTROLLED, "+memory")
            for name in _BELOW:
                (path / name).mkdir()
        except OSError:
            self._left.add(path)
            raise
        return number, path

    def tidy(self) -> None:
        """Remove groups that were not empty before, and are now."""
        for path in tuple(self._left):
            try:
                for name in _BELOW:
                    if (path / name).exists():
                        (path / name).rmdir()
                path.rmdir()
            except FileNotFoundError:
                log.debug("%s: removed by somebody else", path)
            except OSError:  # a process is in it
                continue
            self._left.discard(path)


def find_cgroups() -> Cgroups:
    """Take the control group that this daemon was given, for a parent without children.

    Raises:
        NoCgroupsError: there is none, or it is not the daemon's alone.
    """
    try:
        base = _own()
        if base.name == OURS:
            base = base.parent
        else:
            if (base / _PROCS).read_text().split() != [str(os.getpid())]:
                raise NoCgroupsError("the daemon's cgroup has other processes")
            (base / OURS).mkdir(exist_ok=True)
            _write(base / OURS / _PROCS, "0")
        found = (base / "cgroup.controllers").read_text().split()
        controllers = [name for name in _WANTED if name in found]
        for name in controllers:
            _write(base / _CONTROLLED, f"+{name}")
        return Cgroups(base, controllers)
    except OSError as err:
        raise NoCgroupsError(f"{err.filename or 'cgroup'}: {err.strerror}") from err


def _opened(number: int, path: Path) -> VmCgroup:
    """Open groups for joining.

    Raises:
        OSError: somebody has removed them, or there are no descriptors left.
    """
    guest = os.open(path / _GUEST / _PROCS, os.O_WRONLY | os.O_CLOEXEC)
    try:
        devices = os.open(path / _DEVICES / _PROCS, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        os.close(guest)
        raise
    return VmCgroup(guest, devices, number)


def _own() -> Path:
    """Return the directory of this process's group in the unified hierarchy."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    named = [PurePosixPath(line[3:]) for line in lines if line.startswith("0::")]
    if not named or ".." in named[0].parts:
        raise NoCgroupsError("this process is in no cgroup of version 2 that it could see")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        kind = fields[fields.index("-") + 1]
        root = PurePosixPath(fields[3])
        if kind == "cgroup2" and named[0].is_relative_to(root):
            return Path(fields[4]) / named[0].relative_to(root)
    raise NoCgroupsError("no cgroup of version 2 is mounted")


def _write(path: Path, text: str) -> None:
    """Write a setting; its file is there already."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as err:
        raise OSError(err.errno, err.strerror, str(path)) from err
    finally:
        os.close(fd)
