"""`start --from` for users other than root, and under the name of a VM that is there."""

from __future__ import annotations

import pytest

from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import InterfaceConfig, Owner, VmConfig
from vmd.rules.copies import Fitted
from vmd.rules.policy import Denied, Users
from vmd.rules.transfers import received_vm
from vmd.rules.vm import Passed, Vm
from vmd.rules.vm_state import Phase, VmState
from vmd.wire.messages import ErrorCode
from vmd.wire.parts import DiskRequest
from vmd.wire.transfers import Receive, ReceivedInterface

ROOT, ALICE, BOB = 0, 1001, 1002
USERS = Users(frozenset({ROOT}), lambda _uid, _gid: False)
MIB = 1 << 20
LLADDR = "fe:e1:bb:d1:00:01"
CONFIG = VmConfig(
    "web",
    memory=64 * MIB,
    cpus=2,
    boot="/vm/kernel",
    disks=(
        DiskOption(DiskKind.QCOW2, "/vm/disk.qcow2", serial="one"),
        DiskOption(DiskKind.RAW, "/vm/tools", is_read_only=True),
    ),
    cdrom="/vm/cd.iso",
    interfaces=(InterfaceConfig(is_local=True, lladdr=LLADDR, tap="tap7"),),
    owner=Owner(ALICE),
    allow_snapshot=True,
    after=("other",),
)
REQUEST = Receive(
    name="web",
    source="web",
    stream=0,
    manifest="",
    is_snapshot=True,
    is_copy=True,
    memory=64 * MIB,
    cpus=2,
    boot="/evil",
    disks=(
        DiskRequest(path="/d", chain=(1,), format="raw", is_snapshot=True, window=(8, 9)),
        DiskRequest(path="/vm/tools", chain=(2,), format="raw", is_read_only=True),
    ),
    interfaces=(ReceivedInterface(lladdr=LLADDR, switch="secret"),),
    cdrom="/x",
    cdrom_image=3,
)
PASSED = Passed(uid=ALICE, stream=10, disks=((11,), (12,)), cdrom=13, is_snapshot=True)


def decide(
    request: Receive = REQUEST,
    uid: int = ALICE,
    config: VmConfig = CONFIG,
    phase: Phase = Phase.STOPPED,
) -> Fitted | Denied:
    """Return the decision, with one VM in the table."""
    vm = Vm(config, VmState(1, phase=phase), ROOT)
    return received_vm(request, PASSED, uid, USERS, [vm])


def changed(**fields: object) -> Receive:
    """Return the request, otherwise."""
    told = {field: getattr(REQUEST, field) for field in REQUEST.__struct_fields__}
    return Receive(**{**told, **fields})


@pytest.mark.parametrize("uid", [ALICE, ROOT])
def test_an_existing_vm_goes_back(uid: int) -> None:
    """It is what its configuration says, with the disks that are in the snapshot."""
    fitted = decide(uid=uid)
    assert isinstance(fitted, Fitted)
    assert fitted.vm is not None
    kept = DiskOption(DiskKind.RAW, "/d", serial="one", is_snapshot=True, window=(8, 9))
    assert fitted.config == CONFIG._replace(disks=(kept, CONFIG.disks[1]))
    assert fitted.passed == PASSED._replace(cdrom=None, disks=((11,), ()))
    assert fitted.unused is not None
    assert sorted(fitted.unused.fds) == [12, 13]


def test_an_owner_has_copies() -> None:
    """An owner's copies have the properties of the snapshot's VM, not of the snapshot."""
    fitted = decide(changed(name="copy"))
    assert isinstance(fitted, Fitted)
    assert fitted.vm is None
    config = fitted.config
    assert (config.name, config.boot, config.owner) == ("copy", "/vm/kernel", Owner(ALICE))
    assert config.interfaces == (InterfaceConfig(is_local=True, lladdr=LLADDR),)
    assert (config.after, config.disks[0].window) == ((), (8, 9))


def test_root_has_what_the_snapshot_says() -> None:
    """For a new name nothing has to be there before."""
    fitted = decide(changed(name="copy", cdrom="", cdrom_image=None), ROOT)
    assert isinstance(fitted, Fitted)
    assert (fitted.config.boot, fitted.passed) == ("/evil", PASSED)


def switched(config: VmConfig) -> VmConfig:
    """Return a VM with its interface on a switch."""
    return config._replace(interfaces=(InterfaceConfig(switch="lan", lladdr=LLADDR),))


@pytest.mark.parametrize(("phase", "is_busy"), [(Phase.RUNNING, True), (Phase.STOPPED, False)])
def test_an_lladdr_is_on_a_switch_once(phase: Phase, *, is_busy: bool) -> None:
    """Root has no copy beside the VM that it is of; after it, it may."""
    interface = ReceivedInterface(lladdr=LLADDR, switch="lan")
    wanted = changed(name="copy", interfaces=(interface,))
    decided = decide(wanted, ROOT, switched(CONFIG), phase)
    if not is_busy:
        assert isinstance(decided, Fitted)
        return
    text = "interface 0: web has its lladdr, on switch lan"
    assert decided == Denied(ErrorCode.EBUSY, text)


@pytest.mark.parametrize(
    ("request_", "uid", "config", "phase", "text"),
    [
        (REQUEST, BOB, CONFIG, Phase.STOPPED, "the VM is not yours"),
        (REQUEST, ALICE, CONFIG, Phase.PAUSED, ""),
        (changed(is_copy=False), ROOT, CONFIG, Phase.STOPPED, 'there is a VM "web"'),
        (changed(name="copy"), BOB, CONFIG, Phase.RUNNING, 'vm "web" is not yours'),
        (
            changed(name="copy"),
            ALICE,
            CONFIG._replace(allow_snapshot=False),
            Phase.RUNNING,
            'vm "web" no permission to make snapshots',
        ),
        (
            changed(name="copy", source="none"),
            ALICE,
            CONFIG,
            Phase.RUNNING,
            "only for root, unless the VM of the snapshot is there",
        ),
        (
            changed(name="copy"),
            ALICE,
            switched(CONFIG),
            Phase.RUNNING,
            "interface 0: its lladdr would be on switch lan twice",
        ),
        (changed(name="../copy"), ALICE, CONFIG, Phase.RUNNING, "invalid VM name"),
    ],
)
def test_what_is_refused(
    request_: Receive, uid: int, config: VmConfig, phase: Phase, text: str
) -> None:
    """One line says why."""
    denied = decide(request_, uid, config, phase)
    assert isinstance(denied, Denied)
    assert denied.message == text


@pytest.mark.parametrize(
    ("what", "request_"),
    [
        ("memory", changed(memory=128 * MIB)),
        ("cpus", changed(cpus=1)),
        ("vsock", changed(has_vsock=True)),
        ("disks", changed(disks=REQUEST.disks[:1])),
        ("cdrom", changed(cdrom="")),
        ("interfaces", changed(interfaces=())),
    ],
)
@pytest.mark.parametrize("name", ["web", "copy"])
def test_a_snapshot_of_another_machine(what: str, request_: Receive, name: str) -> None:
    """It has to fit the VM whose configuration counts."""
    told = {field: getattr(request_, field) for field in request_.__struct_fields__}
    assert decide(Receive(**{**told, "name": name})) == Denied(
        ErrorCode.EINVAL, f"the snapshot is of a VM with other {what} than {name}"
    )


def test_a_disk_that_the_vm_does_not_write() -> None:
    """Its contents are the host's, not the snapshot's."""
    kept = DiskRequest(path="/d", chain=(1,), format="raw", is_snapshot=True, window=(8, 9))
    denied = decide(changed(disks=(kept, kept)))
    assert isinstance(denied, Denied)
    assert denied.message == "disk /d: the snapshot is of a VM that wrote to it"


def test_it_ends_as_it_was() -> None:
    """The configuration is back, with links as they are now, and nothing of the snapshot's open."""
    fitted = decide()
    assert isinstance(fitted, Fitted)
    vm = fitted.vm
    assert vm
    vm.configured, vm.config, vm.passed, vm.passed_is_lasting = (
        vm.config,
        fitted.config,
        fitted.passed,
        True,
    )
    vm.state = vm.state._replace(phase=Phase.RUNNING)
    assert vm.drop_passed() == Passed(uid=ALICE, stream=10)
    assert vm.config == fitted.config
    vm.state = vm.state._replace(phase=Phase.STOPPED)
    left = vm.drop_passed()
    assert left is not None
    assert left.fds == [11]
    assert vm.config == CONFIG
    assert vm.passed is None
    assert vm.configured is None
