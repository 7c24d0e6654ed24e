"""VMs with encrypted memory: what they cannot have, what cannot be done to them, /dev/sev."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.vmd.registry_host import BOB, Host
from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import Owner, Right, VmConfig
from vmd.parent.encryption import announce, open_sev
from vmd.parent.errors import ResourceError
from vmd.rules.encryption import why_not_started
from vmd.rules.vm import Passed, Vm
from vmd.rules.vm_state import Running, VmState
from vmd.wire.messages import ErrorCode, Failed, Start
from vmd.wire.ports import Debug
from vmd.wire.transfers import Clone, Send, Snapshot

PLAIN = VmConfig("plain", memory=1 << 28, boot="/k", given=frozenset({Right.BOOT}))
SEALED = PLAIN._replace(name="sealed", is_sev=True, instance_owner=Owner(BOB))
SEALED_ES = SEALED._replace(name="es", is_sev_es=True)
REFUSALS: tuple[tuple[VmConfig, dict[str, bool], str | None], ...] = (
    (SEALED, {}, None),
    (SEALED_ES, {}, None),
    (SEALED._replace(cpus=8), {}, None),
    (SEALED_ES._replace(cpus=2), {}, None),
    (SEALED, {"continues": True}, "cannot continue from saved memory"),
    (SEALED, {"is_template": True}, "cannot be a template"),
    (SEALED._replace(has_balloon=True), {}, "not with balloon"),
    (
        SEALED._replace(disks=(DiskOption(DiskKind.PMEM, "/d"),)),
        {},
        "not with a disk of format pmem",
    ),
    (SEALED._replace(disks=(DiskOption(DiskKind.RAW, "/d"),)), {}, None),
    (SEALED._replace(boot=None), {}, "it needs a kernel, or firmware uefi"),
    (SEALED._replace(boot=None), {"has_image": True}, None),
    (SEALED._replace(boot=None, firmware="bios"), {}, "it needs a kernel, or firmware uefi"),
    (SEALED._replace(boot=None, firmware="uefi"), {}, None),
    (SEALED._replace(boot=None, firmware="/usr/share/OVMF_CODE.fd"), {}, None),
    (SEALED._replace(has_vsock=True, has_watchdog=True), {}, None),
)


@pytest.mark.parametrize(("config", "told", "text"), REFUSALS)
def test_what_it_cannot_have(config: VmConfig, told: dict[str, bool], text: str | None) -> None:
    """Each thing that needs to read or move the memory is refused by its name, and no other."""
    flags = {"is_template": False, "continues": False, "has_image": False, **told}
    reason = why_not_started(config, **flags)
    assert (reason is None) == (text is None)
    assert text is None or text in str(reason)


def test_what_cannot_be_done_to_it() -> None:
    """It can be neither sent nor kept nor cloned nor debugged; a plain VM can."""
    host = Host()
    host.run(host.registry.load((PLAIN, SEALED)))
    for name in ("plain", "sealed"):
        host.ask(Start(name=name))
        host.report(host.launch(name), Running())
    asked = {
        "sent, nor kept as a snapshot": (
            Send(name="sealed", stream=0, keeps_running=False),
            Snapshot(name="sealed", snapshot="one"),
        ),
        "cloned": (Clone(name="sealed", clone="other"),),
        "debugged": (Debug(name="sealed"),),
    }
    for what, requests in asked.items():
        for request in requests:
            answer = host.ask(request)
            assert isinstance(answer, Failed)
            assert answer.code == ErrorCode.EINVAL
            assert answer.message == f"the VM's memory is encrypted: it cannot be {what}"
    answer = host.ask(Debug(name="plain"))
    assert not isinstance(answer, Failed)


def test_instances_are_encrypted_too() -> None:
    """An instance of a VM with encrypted memory has such memory, whoever makes it."""
    host = Host()
    host.run(host.registry.load((SEALED, SEALED_ES._replace(instance_owner=Owner(BOB)))))
    for template in ("sealed", "es"):
        host.ask(Start(name=f"my{template}", instance=template), BOB)
        config = host.vm(f"my{template}").config
        assert (config.is_sev, config.is_sev_es) == (True, template == "es")


def vm_of(config: VmConfig) -> Vm:
    """Return a VM that is about to start."""
    return Vm(config, VmState(1), 0)


def test_the_device(tmp_path: Path) -> None:
    """OpenBSD's line where it is missing; a file or another device in its place is told of."""
    for path, text in (
        (tmp_path / "sev", "not available"),
        (tmp_path, "not available: /dev/sev: No such device"),
        (Path(os.devnull), "not available: /dev/sev: Inappropriate ioctl for device"),
    ):
        with pytest.raises(ResourceError) as caught:
            open_sev(vm_of(SEALED), str(path))
        assert caught.value.code == ErrorCode.EINVAL
        assert str(caught.value) == f"{path} {text}"


def test_what_is_refused_before_the_device() -> None:
    """A VM that cannot be encrypted hears of that, even where there is no device."""
    vm = vm_of(SEALED._replace(has_balloon=True))
    with pytest.raises(ResourceError, match="its memory is to be encrypted: not with balloon"):
        open_sev(vm, "/nonexistent")
    vm = vm_of(SEALED)
    vm.passed = Passed(0, stream=0)
    with pytest.raises(ResourceError, match="cannot continue from saved memory"):
        open_sev(vm, "/nonexistent")


def test_no_device_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """The daemon starts without a word where there is no such processor; a wrong device is told."""
    announce("/nonexistent")
    assert caplog.text == ""
    announce(os.devnull)
    assert "failed to get platform state: /dev/sev: Inappropriate ioctl" in caplog.text
