"""The process of a disk or an interface: from vmm's order to a device, or the reason for none."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import InterfaceConfig
from vmd.device import disk, nic
from vmd.device.process import Make, run
from vmd.shared import log as logging
from vmd.shared.counters import make_counters
from vmd.wire.channel import Channel
from vmd.wire.device import VMM_AND_DEVICE, BeginDisk, BeginNic
from vmd.wire.internal import DiskSpec, NicSpec, SetVerbosity
from vmm_kvm.virtio.vhost_user.readiness import READY

SIZE = 1 << 20
INTERFACE = InterfaceConfig(lladdr="fe:e1:bb:d1:00:01")


@pytest.fixture(autouse=True)
def names() -> Iterator[None]:
    """Restore the process's title, and its log level."""
    comm = Path("/proc/self/comm")
    before = comm.read_text()
    yield
    comm.write_text(before)
    logging.set_title("vmd")


class Rig:
    """A device's process, with the test as vmm and the VM: both are gone when it begins."""

    def __init__(self) -> None:
        self.near, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.vmm = Channel(theirs, VMM_AND_DEVICE)
        self.status, self._status = os.pipe()
        vm, self._vm = socket.socketpair()
        vm.close()

    def begin(self, begin: BeginDisk | BeginNic, *own: int) -> None:
        """Send the order for the process."""
        fds = [*own, make_counters(), self._vm.detach(), self._status]
        self.vmm.send(begin, fds)

    def run(self, make: Make) -> tuple[int, bytes]:
        """Run the process; returns its status, and its messages to the VM."""
        self.vmm.close()
        status = run("disk", self.near, make)
        told = os.read(self.status, 4096)
        os.close(self.status)
        self._vm.close()
        return status, told


def _disk(path: Path, kind: DiskKind = DiskKind.RAW) -> BeginDisk:
    option = DiskOption(kind, str(path), serial="s1")
    spec = DiskSpec(option=option, chain=(0,), formats=(kind or DiskKind.RAW,))
    return BeginDisk(disk=spec, vm="one", verbosity=0)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a raw image."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


@pytest.mark.parametrize("kind", [DiskKind.RAW, DiskKind.PROBE])
def test_a_disk(image: Path, kind: DiskKind) -> None:
    """A disk's process reports that it is ready, serves its VM, and ends with it."""
    rig = Rig()
    rig.begin(_disk(image, kind), _open(image))
    assert rig.run(disk.make) == (0, READY)


def test_what_is_no_image(image: Path) -> None:
    """The VM gets the reason in one line; the process ends properly."""
    rig = Rig()
    rig.begin(_disk(image, DiskKind.QCOW2), _open(image))
    status, told = rig.run(disk.make)
    assert status == 0
    assert told.decode().startswith(f"{image}: ")


def test_what_is_no_tap() -> None:
    """An interface's process learns from the kernel that a file is no tap."""
    rig = Rig()
    spec = NicSpec(name="tap7", config=INTERFACE, taps=(0,))
    rig.begin(BeginNic(nic=spec, vm="one", verbosity=0), os.open(os.devnull, os.O_RDWR))
    status, told = rig.run(nic.make)
    assert status == 0
    assert told not in {b"", READY}


def test_a_process_is_of_one_kind(image: Path) -> None:
    """A disk's process serves no interface, and the other way round."""
    rig = Rig()
    spec = NicSpec(name="tap7", config=INTERFACE, taps=(0,))
    rig.begin(BeginNic(nic=spec, vm="one", verbosity=0), _open(image))
    assert rig.run(disk.make) == (0, b"tap7 is no disk")
    rig = Rig()
    rig.begin(_disk(image), _open(image))
    assert rig.run(nic.make) == (0, f"{image} is no interface".encode())


@pytest.mark.parametrize("kind", [DiskKind.RAW, DiskKind.QCOW2])
def test_a_vm_that_was_ended_meanwhile(image: Path, kind: DiskKind) -> None:
    """A disk's process that is ready, or fails, when nobody waits any more ends without a word."""
    rig = Rig()
    rig.begin(_disk(image, kind), _open(image))
    os.close(rig.status)
    rig.vmm.close()
    assert run("disk", rig.near, disk.make) == 0


def test_a_process_that_nobody_needs(image: Path) -> None:
    """If vmm is gone, or sends another message first, the process ends."""
    rig = Rig()
    os.close(rig._status)
    assert rig.run(disk.make) == (0, b"")
    rig = Rig()
    os.close(rig._status)
    rig.vmm.send(SetVerbosity(level=1))
    assert rig.run(disk.make) == (1, b"")
    assert image.stat().st_size == SIZE
