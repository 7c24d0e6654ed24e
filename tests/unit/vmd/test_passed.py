"""The files of a VM that belong to a client, and the rights used to open them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import Owner, Right, VmConfig
from vmd.parent.passed import ClientFiles
from vmd.rules.policy import Users
from vmd.rules.vm import Passed, Vm
from vmd.rules.vm_state import VmState
from vmd.shared.opening import OpeningError
from vmd.wire.files import FileUse, FoundFile

ALICE, BOB = 1001, 1002
USERS = Users(frozenset({0}), lambda _uid, _gid: False)
ALL = frozenset({Right.BOOT, Right.CDROM, Right.DISK})


def _vm(config: VmConfig, *, checked: frozenset[Right] = ALL, requester: int = ALICE) -> Vm:
    vm = Vm(config, VmState(1), requester)
    vm.checked = checked
    return vm


def _wanted(files: ClientFiles) -> list[tuple[FileUse, str, tuple[int, ...]]]:
    return [(one.use, one.path, one.passed) for one in files.wanted]


def test_what_a_client_names() -> None:
    """Firmware, ISO image and disks of an instance are opened with its maker's rights."""
    disks = (DiskOption(DiskKind.RAW, "/d", is_read_only=True), DiskOption(DiskKind.PROBE, "/e"))
    files = ClientFiles(_vm(VmConfig("x", firmware="/f", cdrom="/c", disks=disks)), USERS)
    assert (files.uid, files.fds) == (ALICE, [])
    assert _wanted(files) == [
        (FileUse.FIRMWARE, "/f", ()),
        (FileUse.CDROM, "/c", ()),
        (FileUse.DISK, "/d", ()),
        (FileUse.DISK, "/e", ()),
    ]
    assert [one.writes for one in files.wanted] == [False, False, False, True]


def test_what_the_configuration_names_is_no_clients() -> None:
    """Files of the configuration are opened by the parent, for instances too; servers are none."""
    disks = (DiskOption(DiskKind.RAW, "/d"), DiskOption(DiskKind.VHOST_USER, "/s"))
    config = VmConfig("x", boot="/k", cdrom="/c", disks=disks, owner=Owner(ALICE))
    assert _wanted(ClientFiles(_vm(config, checked=frozenset()), USERS)) == []
    instance = VmConfig("x", firmware="bios", disks=disks[1:])
    assert _wanted(ClientFiles(_vm(instance, requester=0), USERS)) == []


def test_what_a_client_passes() -> None:
    """A passed file is checked, and returned as a descriptor in the same place."""
    null = os.open("/dev/null", os.O_RDONLY)
    config = VmConfig("x", append="theirs", disks=(DiskOption(DiskKind.RAW, "/d"),))
    vm = _vm(config, checked=frozenset({Right.DISK}))
    vm.passed = Passed(ALICE, kernel=null, path="/k", append="own", disks=((null, null),))
    files = ClientFiles(vm, USERS)
    assert _wanted(files) == [(FileUse.BOOT, "/k", (0,)), (FileUse.DISK, "/d", (1, 2))]
    found = [
        FoundFile(chain=(0,), stamp="s"),
        FoundFile(chain=(1, 2), formats=(DiskKind.QCOW2, DiskKind.RAW)),
    ]
    judged = files.judged(found, [70, 71, 72])
    assert (judged.kernel, judged.append, judged.stamp) == (70, "own", "s")
    assert (judged.disks, judged.formats) == (((71, 72),), ((DiskKind.QCOW2, DiskKind.RAW),))
    assert judged.fds == [70, 71, 72]
    vm.passed = judged
    assert ClientFiles(vm, USERS).wanted == []  # at a reboot
    for fd in (null, *files.fds):
        os.close(fd)


def test_bases_of_probed_images_are_their_owners(tmp_path: Path) -> None:
    """A probed image is opened with our rights, the files that it refers to with the owner's."""
    image = tmp_path / "image"
    image.write_bytes(b"x")
    config = VmConfig(
        "x", disks=(DiskOption(DiskKind.PROBE, str(image)),), owner=Owner(BOB), boot="/k"
    )
    files = ClientFiles(_vm(config, checked=frozenset(), requester=0), USERS)
    assert (files.uid, len(files.fds)) == (BOB, 1)
    (wanted,) = files.wanted
    assert (wanted.use, wanted.passed, wanted.follows_bases) == (FileUse.DISK, (0,), True)
    os.close(files.fds[0])
    roots = config._replace(owner=Owner(0))
    assert ClientFiles(_vm(roots, checked=frozenset(), requester=0), USERS).wanted == []
    image.unlink()
    with pytest.raises(OpeningError, match="No such file"):
        ClientFiles(_vm(config, checked=frozenset(), requester=0), USERS)
