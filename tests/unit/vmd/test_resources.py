"""A VM's resources of the host: its files are opened and locked, or there is a reason."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmd.children import share_plan
from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import Config, InterfaceConfig, Owner, VmConfig
from vmd.config.seeds import SeedOption
from vmd.parent.errors import ResourceError
from vmd.parent.interfaces import Interface
from vmd.parent.resources import VARIABLES_PER_USER, Host, open_resources
from vmd.parent.scratches import Scratches
from vmd.parent.seeds import with_seeds
from vmd.parent.shares import Shares
from vmd.parent.tpms import Tpms
from vmd.rules.policy import Users
from vmd.rules.vm import Passed, Vm
from vmd.rules.vm_state import VmState
from vmd.shared.kernels import KernelStore
from vmd.shared.pty import Pty
from vmd.wire.internal import MadeTap, TapSpec, VmSpec
from vmd.wire.messages import ErrorCode
from vmm_kvm.boot.firmware import find_firmware
from vmm_kvm.errors import BootError
from vmm_kvm.images.create import create_qcow2, create_raw
from vmm_kvm.loop import EventLoop

SIZE = 1 << 20


class Rig:
    """A host with a directory of files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kernel = path / "kernel"
        self.kernel.write_bytes(b"kernel")
        users = Users(frozenset({os.geteuid()}), lambda _uid, _gid: False)
        self.scratches = Scratches()
        shares = Shares(lambda order: share_plan(order, is_user=True))
        self.loop = EventLoop()
        tpms = Tpms(self.loop, str(path), users)
        self.host = Host(users, KernelStore(), str(path), self.scratches, shares, tpms)
        self.fds: list[int] = []

    def open(
        self,
        config: VmConfig,
        *networks: Interface,
        boot: Passed | None = None,
        requester: int | None = None,
    ) -> VmSpec:
        """Open a VM's resources, by default one of this user's; the descriptors are in `fds`."""
        uid = os.geteuid() if requester is None else requester
        vm = Vm(config._replace(owner=Owner(requester or 0)), VmState(1), uid)
        vm.passed = boot
        null = os.open(os.devnull, os.O_RDWR)
        try:
            spec, fds, _stamp = open_resources(
                vm, self.host, Pty("/dev/pts/9", null, null), networks
            )
        finally:
            os.close(null)
        self.fds += fds
        return spec

    def open_disk(self, kind: DiskKind, path: Path, **fields: bool) -> VmSpec:
        """Open the resources of a VM with one disk."""
        option = DiskOption(kind, str(path))._replace(**fields)  # type: ignore[arg-type] # flags
        return self.open(VmConfig("one", boot=str(self.kernel), disks=(option,)))

    def error(self, config: VmConfig, requester: int | None = None) -> tuple[ErrorCode, str]:
        """Return the reason for which a VM's resources fail; nothing stays open."""
        with pytest.raises(ResourceError) as caught:
            self.open(config, requester=requester)
        return caught.value.code, str(caught.value)

    def path_of(self, index: int | None) -> str:
        """Return the path of a descriptor's file."""
        assert index is not None
        return str(Path(f"/proc/self/fd/{self.fds[index]}").readlink())

    def close(self) -> None:
        """Close everything opened."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Return a host."""
    made = Rig(tmp_path)
    yield made
    made.close()
    made.loop.close()
    made.scratches.close_all()


def test_a_kernel_and_ram_disks(rig: Rig) -> None:
    """Kernel and ram disks open by their paths, unless a client has passed others."""
    initrd = rig.path / "initrd"
    initrd.write_bytes(b"initrd")
    config = VmConfig("one", boot=str(rig.kernel), initrd=(str(initrd),), append="quiet", cpus=2)
    spec = rig.open(config)
    assert rig.path_of(spec.boot) == str(rig.kernel)
    assert [rig.path_of(at) for at in spec.initrd] == [str(initrd)]
    assert (spec.append, spec.cpus, spec.boot_path) == ("quiet", 2, str(rig.kernel))
    rig.close()
    fd = os.open(initrd, os.O_RDONLY)
    spec = rig.open(config, boot=Passed(os.geteuid(), kernel=fd, append="loud", path="passed"))
    os.close(fd)
    assert rig.path_of(spec.boot) == str(initrd)
    assert (spec.initrd, spec.append, spec.boot_path) == ((), "loud", "passed")


def test_a_user_keeps_so_many_variables(rig: Rig) -> None:
    """Files of UEFI variables outlive their VMs: each user has a limit of them."""
    try:
        find_firmware("uefi")
    except BootError as err:
        pytest.skip(str(err))
    config, user = VmConfig("one", firmware="uefi"), 12345
    rig.open(config, requester=user)
    rig.close()
    kept = f"one-{user}.nvram"
    assert [path.name for path in rig.path.glob("*.nvram")] == [kept]
    for number in range(VARIABLES_PER_USER - 1):
        (rig.path / f"vm{number}-{user}.nvram").touch()
    refused = rig.error(config._replace(name="two"), user)
    text = f"limit of {VARIABLES_PER_USER} VMs of one user whose UEFI variables are kept"
    assert refused == (ErrorCode.EPERM, text)
    rig.open(config, requester=user)
    rig.open(config._replace(name="two"), requester=user + 1)
    rig.open(config._replace(name="three"))


@pytest.mark.parametrize("kind", [DiskKind.PROBE, DiskKind.RAW])
def test_a_raw_disk_is_locked(rig: Rig, kind: DiskKind) -> None:
    """A writer excludes all others; two may read."""
    path = rig.path / "disk.img"
    create_raw(str(path), SIZE)
    (disk,) = rig.open_disk(kind, path).disks
    assert (disk.formats, rig.path_of(disk.chain[0])) == ((DiskKind.RAW,), str(path))
    with pytest.raises(ResourceError, match=f"^{path}: "):
        rig.open_disk(kind, path)
    rig.close()
    rig.open_disk(kind, path, is_read_only=True)
    rig.open_disk(kind, path, is_read_only=True)


def test_a_qcow2_disk_with_a_base(rig: Rig) -> None:
    """A qcow2 disk's base is opened too, for reading."""
    base, overlay = rig.path / "base.qcow2", rig.path / "overlay.qcow2"
    create_qcow2(str(base), SIZE)
    create_qcow2(str(overlay), SIZE, str(base))
    (disk,) = rig.open_disk(DiskKind.QCOW2, overlay).disks
    assert [rig.path_of(at) for at in disk.chain] == [str(overlay), str(base)]
    assert disk.formats == (DiskKind.QCOW2,) * 2
    rig.close()
    base.unlink()
    with pytest.raises(ResourceError, match=r"base.qcow2: No such file"):
        rig.open_disk(DiskKind.QCOW2, overlay)


def test_a_disk_that_is_memory(rig: Rig) -> None:
    """A memory disk is locked like others; a private one is only read."""
    path = rig.path / "disk.img"
    create_raw(str(path), SIZE)
    (disk,) = rig.open_disk(DiskKind.PMEM, path).disks
    assert not disk.has_process
    with pytest.raises(ResourceError, match=f"^{path}: "):
        rig.open_disk(DiskKind.PMEM, path)
    rig.close()
    rig.open_disk(DiskKind.PMEM, path, is_private=True)
    rig.open_disk(DiskKind.PMEM, path, is_private=True)


def test_a_disk_that_somebody_serves(rig: Rig) -> None:
    """A vhost-user disk's socket is connected; without a listener, the reason names it."""
    path = rig.path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        with pytest.raises(ResourceError, match=f"^vhost-user:{path}: Connection refused$"):
            rig.open_disk(DiskKind.VHOST_USER, path)
        server.listen()
        (disk,) = rig.open_disk(DiskKind.VHOST_USER, path).disks
        assert not disk.has_process
        server.accept()[0].close()


def test_what_is_missing(rig: Rig) -> None:
    """The text names the file and the reason, the code the kind; nothing is left open."""
    gone = str(rig.path / "gone")
    kernel = VmConfig("one", boot=str(rig.kernel))
    text = "No such file or directory"
    missing = DiskOption(DiskKind.RAW, gone)
    assert rig.error(VmConfig("one", boot=gone)) == (ErrorCode.ENOENT, f"boot image {gone}: {text}")
    assert rig.error(kernel._replace(cdrom=gone)) == (
        ErrorCode.CDROM_MISSING,
        f"cdrom {gone}: {text}",
    )
    assert rig.error(kernel._replace(disks=(missing,))) == (
        ErrorCode.DISK_MISSING,
        f"disk {gone}: {text}",
    )
    assert rig.error(kernel._replace(cdrom=str(rig.path)))[0] is ErrorCode.CDROM_INVALID
    assert rig.error(VmConfig("one", firmware=gone))[0] is ErrorCode.BIOS_MISSING
    assert rig.error(kernel._replace(is_sev=True))[0] is ErrorCode.EINVAL


def test_an_interface(rig: Rig) -> None:
    """An interface's queues, or its stream, are passed on with its configuration."""
    config = InterfaceConfig(lladdr="fe:e1:bb:d1:00:01", mtu=9000, is_locked=True)
    tap = TapSpec(config=config, alias="vm1-if0-one")
    null = os.open(os.devnull, os.O_RDWR)
    spec = rig.open(
        VmConfig("one", boot=str(rig.kernel)),
        Interface(tap, MadeTap(name="tap3", index=7), (null, null), may_vhost=False),
        Interface(tap, MadeTap(name="", index=0), (), may_vhost=False, stream=null, has_link=False),
    )
    os.close(null)
    first, second = spec.interfaces
    assert (first.name, first.config, first.mtu, len(first.taps)) == ("tap3", config, 9000, 2)
    assert (first.has_process, first.stream, first.is_up) == (True, None, True)
    assert (second.name, second.has_process, second.is_up) == ("vm1-if0-one", False, False)
    assert second.stream is not None
    assert rig.path_of(second.stream) == os.devnull


def test_a_throw_away_disk(
    rig: Rig, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file has no name and stays the same over reboots; the image is locked as for reading."""
    path, scratch = rig.path / "disk.img", tmp_path_factory.mktemp("scratch")
    create_raw(str(path), SIZE)
    monkeypatch.setenv("TMPDIR", str(scratch))
    (disk,) = rig.open_disk(DiskKind.PROBE, path, is_snapshot=True).disks
    assert (disk.formats, disk.files) == ((DiskKind.RAW,), (*disk.chain, disk.scratch))
    assert list(scratch.iterdir()) == []
    assert rig.path_of(disk.scratch).startswith(f"{scratch}/")
    assert fcntl.fcntl(rig.fds[disk.chain[0]], fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    os.pwrite(rig.fds[disk.scratch or 0], b"kept", 0)
    rig.close()
    (again,) = rig.open_disk(DiskKind.PROBE, path, is_snapshot=True).disks
    assert os.pread(rig.fds[again.scratch or 0], 4, 0) == b"kept"
    rig.close()
    rig.scratches.close(1)
    (anew,) = rig.open_disk(DiskKind.PROBE, path, is_snapshot=True).disks
    assert os.fstat(rig.fds[anew.scratch or 0]).st_size == 0
    with pytest.raises(ResourceError, match=f"^{path}: "):
        rig.open_disk(DiskKind.PROBE, path)
    rig.close()
    (read,) = rig.open_disk(DiskKind.PROBE, path, is_snapshot=True, is_read_only=True).disks
    assert read.scratch is None
    rig.scratches.close(1)
    monkeypatch.setenv("TMPDIR", str(path))
    with pytest.raises(ResourceError, match=r"^no file for a throw-away disk: "):
        rig.open_disk(DiskKind.PROBE, path, is_snapshot=True)


def test_a_seed(rig: Rig) -> None:
    """The seed is a disk that is made at each boot, unless a VM goes on; bad files are reported."""
    user_data = rig.path / "user-data"
    user_data.write_text("#cloud-config\nhostname: first\n")
    plain = VmConfig("one", boot=str(rig.kernel), seed=SeedOption(str(user_data)))
    (config,) = with_seeds(Config(vms=(plain,)), str(rig.path)).vms
    path = rig.path / "one.seed"

    def text(boot: Passed | None = None) -> bytes:
        (disk,) = rig.open(config, boot=boot).disks
        assert (disk.formats, disk.option.is_read_only) == ((DiskKind.RAW,), True)
        assert rig.path_of(disk.chain[0]) == str(path)
        data = os.pread(rig.fds[disk.chain[0]], SIZE, 0)
        rig.close()
        return data

    assert b"hostname: first" in text()
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.stat().st_ino
    text()
    assert path.stat().st_ino == before
    user_data.write_text("#cloud-config\nhostname: second\n")
    stream = os.open(os.devnull, os.O_RDONLY)
    goes_on = Passed(uid=0, stream=stream)
    assert b"hostname: first" in text(goes_on)
    assert b"hostname: second" in text()
    path.unlink()
    assert b"hostname: second" in text(goes_on)
    os.close(stream)
    user_data.write_text("hostname: third\n")
    code, told = rig.error(config)
    assert code is ErrorCode.EINVAL
    assert told.startswith(f"seed: {user_data}: no user-data: ")
    path.unlink()
    path.symlink_to(user_data)
    user_data.write_text("#cloud-config\n")
    code, told = rig.error(config)
    assert (code, told) == (ErrorCode.EIO, f"seed {path}: Too many levels of symbolic links")
    assert with_seeds(Config(vms=(plain._replace(seed=None),)), None).vms[0].disks == ()
