"""A /dev/kvm that cannot be used: one line with the fault and the remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from errno import EACCES, EBUSY, EEXIST, EINVAL, ENODEV, ENOENT, ENOTSUP, ENOTTY, ENXIO
from pathlib import Path

import pytest

from vmm_kvm.errors import KvmError, VmmError
from vmm_kvm.kvm.system import Kvm, check_api_version, create_hint, open_hint

MODULE = "load the module kvm_intel or kvm_amd, and enable virtualisation in the firmware"
NOT_KVM = "not a KVM device: name /dev/kvm, or a copy of that device node"


def test_missing(tmp_path: Path) -> None:
    """A path without a device names the module that makes one."""
    path = str(tmp_path / "kvm")
    with pytest.raises(KvmError) as caught:
        Kvm(path)
    assert str(caught.value) == f"{path}: No such file or directory ({MODULE})"
    assert caught.value.errno == ENOENT
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, VmmError)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_another_device(path: str) -> None:
    """Another device is recognised by its error at the version's request."""
    with pytest.raises(KvmError) as caught:
        Kvm(path)
    assert str(caught.value) == f"{path}: Inappropriate ioctl for device ({NOT_KVM})"


def test_a_plain_file(tmp_path: Path) -> None:
    """A plain file is recognised the same way."""
    path = tmp_path / "kvm"
    path.touch()
    with pytest.raises(KvmError) as caught:
        Kvm(str(path))
    assert str(caught.value) == f"{path}: Inappropriate ioctl for device ({NOT_KVM})"
    assert caught.value.errno == ENOTTY


def test_a_directory(tmp_path: Path) -> None:
    """A directory cannot be opened for writing."""
    with pytest.raises(KvmError) as caught:
        Kvm(str(tmp_path))
    assert str(caught.value) == f"{tmp_path}: Is a directory"


def test_fd_that_is_no_kvm_is_closed() -> None:
    """`from_fd` takes ownership of the descriptor, and closes it if it is unusable."""
    fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    with pytest.raises(KvmError) as caught:
        Kvm.from_fd(fd)
    assert str(caught.value) == f"fd {fd}: Inappropriate ioctl for device ({NOT_KVM})"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_fd_that_is_not_open() -> None:
    """A number that is no open descriptor is refused like any other."""
    fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.close(fd)
    with pytest.raises(KvmError) as caught:
        Kvm.from_fd(fd)
    assert str(caught.value) == f"fd {fd}: Bad file descriptor"


def _open_as_somebody(path: Path) -> str:
    """Return the error of a process without privileges that opens `path` as KVM."""
    code = (
        "import sys; from vmm_kvm.kvm.system import Kvm; from vmm_kvm.errors import KvmError\n"
        "try: Kvm(sys.argv[1])\n"
        "except KvmError as err: print(err)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        check=True,
        capture_output=True,
        text=True,
        cwd="/",
        env={"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=_drop_overrides,
    )
    return done.stdout.rstrip("\n")


def _drop_overrides() -> None:
    """Give up root's right to open everything, and every group, but keep root's files."""
    if os.geteuid() == 0:
        import ctypes  # noqa: PLC0415 - in the child only

        libc = ctypes.CDLL(None)
        pr_capbset_drop, cap_dac_override, cap_dac_read_search = 24, 1, 2
        libc.prctl(pr_capbset_drop, cap_dac_override)
        libc.prctl(pr_capbset_drop, cap_dac_read_search)
        os.setgroups([])


def test_forbidden_with_a_group(tmp_path: Path) -> None:
    """For a device that a group may use, the advice is to join that group."""
    path = tmp_path / "kvm"
    path.touch()
    try:
        os.chown(path, -1, 1)
    except PermissionError:
        pytest.skip("giving a file to another group needs root")
    path.chmod(0o060)
    group = "add your user to group daemon: sudo usermod -aG daemon $USER, then log in again"
    assert _open_as_somebody(path) == f"{path}: Permission denied ({group})"


def test_forbidden_without_a_group(tmp_path: Path) -> None:
    """For a device that only root may use, the advice is to change that."""
    path = tmp_path / "kvm"
    path.touch()
    path.chmod(0)
    remedy = f"run as root, or: sudo chgrp kvm {path} && sudo chmod 660 {path}"
    assert _open_as_somebody(path) == f"{path}: Permission denied ({remedy})"


def test_forbidden_out_of_sight(tmp_path: Path) -> None:
    """If not even the device's group is visible, the advice is the plain one."""
    assert open_hint(str(tmp_path / "gone"), EACCES) == "run as root"


@pytest.mark.parametrize(
    ("errno", "hint"),
    [
        (ENODEV, MODULE),
        (ENXIO, MODULE),
        (EBUSY, "another hypervisor uses the device: stop it first"),
        (EINVAL, ""),
    ],
)
def test_other_refusals_to_open(errno: int, hint: str) -> None:
    """A device node without a driver, a busy one, and any other error have a line each."""
    assert open_hint("/dev/kvm", errno) == hint


@pytest.mark.parametrize(
    ("errno", "hint"),
    [
        (EBUSY, "another hypervisor uses the processor's virtualisation: stop it first"),
        (EEXIST, "another hypervisor uses the processor's virtualisation: stop it first"),
        (ENODEV, MODULE),
        (EINVAL, ""),
    ],
)
def test_refusals_to_make_a_vm(errno: int, hint: str) -> None:
    """A processor that another hypervisor uses, or without virtualisation, is reported."""
    assert create_hint(errno) == hint


@pytest.mark.parametrize("version", [0, 10, 13])
def test_wrong_version(version: int) -> None:
    """Only version 12 of the API is used."""
    with pytest.raises(KvmError) as caught:
        check_api_version("/dev/kvm", version)
    text = f"KVM API version {version}, not 12: run Linux 2.6.22 or newer"
    assert str(caught.value) == f"/dev/kvm: Operation not supported ({text})"
    assert caught.value.errno == ENOTSUP


def test_right_version() -> None:
    """Version 12 is accepted."""
    check_api_version("/dev/kvm", 12)
