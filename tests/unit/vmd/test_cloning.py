"""Clones in the table of VMs: refusals, all or none, and answers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.vmd.registry_host import ALICE, BOB, ROOT, Host, code
from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import ForwardConfig, InterfaceConfig, Limits, Owner, Right, VmConfig
from vmd.rules.cloning import CAPTURE_REQUESTS_MAX, clone_config, clone_names
from vmd.rules.policy import Denied
from vmd.rules.vm import Inherited, Passed, Vm
from vmd.rules.vm_state import (
    Exited,
    LaunchFailed,
    Paused,
    Phase,
    Running,
    SendFailed,
    Unpaused,
    VmState,
)
from vmd.wire.messages import (
    ErrorCode,
    EventKind,
    Failed,
    Pause,
    Start,
    Started,
    State,
    Stop,
    Unpause,
)
from vmd.wire.transfers import Clone, Cloned, ClonedVm

SOURCE = VmConfig(
    "source", boot="/kernel", owner=Owner(ALICE), given=frozenset({Right.BOOT}), is_enabled=False
)
FORWARD = ForwardConfig("tcp", 8080, 80)


@pytest.fixture
def host() -> Iterator[Host]:
    """A host with a running VM of ALICE's; nothing is left of it at the end."""
    host = Host()
    host.run(host.registry.load([SOURCE]))
    run(host, "source")
    yield host
    host.end_vmm()
    del host
    gc.collect()


def run(host: Host, name: str, *, is_template: bool = False) -> Vm:
    """Start a VM, until it runs."""
    host.begin(Start(name=name, is_template=is_template))
    vm = host.launch(name)
    host.report(vm, Running())
    return vm


def told(host: Host, key: tuple[int, int]) -> tuple[ClonedVm, ...]:
    """Return the answer to a request for clones."""
    answer = host.answers[key]
    assert isinstance(answer, Cloned)
    return answer.vms


@pytest.mark.parametrize(
    ("pattern", "count", "taken", "names"),
    [
        ("web", 1, (), ["web"]),
        ("web%d", 1, (), ["web1"]),
        ("web%d", 3, ("web2",), ["web1", "web3", "web4"]),
        ("a%d.b", 2, (), ["a1.b", "a2.b"]),
        ("web", 1, ("web",), None),
        ("web", 2, (), None),
        ("-%d", 1, (), None),
        ("we b", 1, (), None),
        ("%d%d", 1, (), None),
        ("a" * 70, 1, (), None),
        (f"{'a' * 62}%d", 9, (), [f"{'a' * 62}{number}" for number in range(1, 10)]),
        (f"{'a' * 62}%d", 10, (), None),
    ],
)
def test_names_of_clones(
    pattern: str, count: int, taken: tuple[str, ...], names: list[str] | None
) -> None:
    """%d becomes the lowest free numbers; names that are invalid or in use are refused."""
    found = clone_names(pattern, count, lambda name: name in taken)
    assert (None if isinstance(found, Denied) else found) == names


@pytest.mark.parametrize(
    ("config", "is_template", "problem"),
    [
        (SOURCE, False, None),
        (
            SOURCE._replace(has_tpm=True),
            True,
            'vm "source" has a TPM, whose secrets stay with it',
        ),
        (
            SOURCE._replace(interfaces=(InterfaceConfig(switch="lan"),)),
            True,
            "interface 0: its lladdr would be on switch lan twice",
        ),
        (
            SOURCE._replace(disks=(DiskOption(DiskKind.RAW, "/a"),)),
            False,
            "disk /a: its clone would write to it too, see start --template",
        ),
        (SOURCE._replace(disks=(DiskOption(DiskKind.RAW, "/a"),)), True, None),
        (SOURCE._replace(interfaces=(InterfaceConfig(is_local=True),)), True, None),
        (
            SOURCE._replace(disks=(DiskOption(DiskKind.RAW, "/a", is_snapshot=True),)),
            True,
            "disk /a: what the guest writes vanishes with the VM",
        ),
        (
            SOURCE._replace(disks=(DiskOption(DiskKind.PMEM, "/a"),)),
            True,
            "disk /a: pmem cannot be cloned",
        ),
        (
            SOURCE._replace(disks=(DiskOption(DiskKind.RAW, "/a", is_read_only=True),)),
            False,
            "a VM with disks has to be a template, see start --template",
        ),
        (SOURCE._replace(disks=(DiskOption(DiskKind.RAW, "/a", is_read_only=True),)), True, None),
    ],
)
def test_what_cannot_be_cloned(config: VmConfig, is_template: bool, problem: str | None) -> None:
    """A property that two VMs cannot both have is refused by its name."""
    found = clone_config(Vm(config, VmState(1, is_template=is_template), ROOT))
    assert (found.message if isinstance(found, Denied) else None) == problem


def test_what_a_clone_has_instead() -> None:
    """A clone's writes vanish with it; it has no tap's name and no forwarded ports."""
    config = SOURCE._replace(
        disks=(DiskOption(DiskKind.RAW, "/a"), DiskOption(DiskKind.RAW, "/b", is_read_only=True)),
        interfaces=(
            InterfaceConfig(
                is_local=True, tap="tap7", lladdr="fe:e1:bb:00:00:01", forwards=(FORWARD,)
            ),
        ),
    )
    found = clone_config(Vm(config, VmState(1, is_template=True), ROOT))
    assert not isinstance(found, Denied)
    assert [disk.is_snapshot for disk in found.disks] == [True, False]
    assert found.interfaces == (InterfaceConfig(is_local=True, lladdr="fe:e1:bb:00:00:01"),)


def test_a_format_that_its_process_has_a_part_of() -> None:
    """A writable qcow2 image is refused: its process has a part of its contents in memory."""
    source = Vm(
        SOURCE._replace(disks=(DiskOption(DiskKind.PROBE, "/a"),)),
        VmState(1, is_template=True),
        ROOT,
    )
    source.lent = Inherited(Passed(ROOT, formats=((DiskKind.QCOW2,),)))
    found = clone_config(source)
    assert isinstance(found, Denied)
    assert found.message == (
        "disk /a: an image in the format qcow2, of which the template's process has a part"
    )


def test_a_running_vm_is_cloned(host: Host) -> None:
    """A running VM is captured, runs on, and its clones start; the answer comes when all run."""
    source = host.vm("source")
    key = host.begin(Clone(name="source", clone="c%d", count=2), ALICE)
    assert host.told[source.id] == ["CaptureVm"]
    assert host.states() == {"source": State.RUNNING}
    host.capture(source)
    assert host.states() == dict.fromkeys(("source", "c1", "c2"), None) | {
        "source": State.RUNNING,
        "c1": State.STARTING,
        "c2": State.STARTING,
    }
    second = host.launch("c2")
    host.report(second, Running())
    assert key in host.pending
    first = host.launch("c1")
    host.report(first, Running())
    assert [(vm.name, vm.id, vm.code) for vm in told(host, key)] == [
        ("c1", first.id, ""),
        ("c2", second.id, ""),
    ]
    assert (first.clone_of, first.config.owner, first.requester) == ("source", Owner(ALICE), ALICE)
    assert first.config.boot == "/kernel"
    assert [event.message for event in host.events if event.kind is EventKind.CLONED] == ["c1, c2"]
    host.end(first, Exited(None))
    assert [vm.name for vm in host.registry.vms] == ["source", "c2"]


def test_a_paused_vm_is_captured_once(host: Host) -> None:
    """While it is paused, later clones use the same capture; not after it has continued."""
    source = host.vm("source")
    host.begin(Pause(name="source"))
    host.report(source, Paused())
    host.begin(Clone(name="source", clone="a"))
    host.capture(source)
    host.begin(Clone(name="source", clone="b"))
    assert host.told[source.id].count("CaptureVm") == 1
    assert host.vm("a").origin is host.vm("b").origin is source.captured
    host.begin(Unpause(name="source"))
    assert source.captured is None
    host.report(source, Unpaused())
    host.begin(Clone(name="source", clone="c"))
    assert host.told[source.id].count("CaptureVm") == 2


def test_a_template_is_cloned_when_it_is_paused(host: Host) -> None:
    """A template that is not paused yet is refused."""
    host.run(host.registry.load([SOURCE._replace(name="template")]))
    template = run(host, "template", is_template=True)
    answer = host.ask(Clone(name="template", clone="a"))
    assert isinstance(answer, Failed)
    assert answer.code == ErrorCode.EBUSY
    assert answer.message == "the template still runs: it has to be paused"
    host.begin(Pause(name="template"))
    host.report(template, Paused())
    host.begin(Clone(name="template", clone="a"))
    host.capture(template)
    assert host.states()["a"] is State.STARTING


def test_all_clones_are_made_or_none(host: Host) -> None:
    """With a name in use, one clone too many, or no right, nothing changes."""
    host.registry.limits = Limits(vms=3)
    source = host.vm("source")
    for request, uid, wanted in (
        (Clone(name="none", clone="a"), ALICE, ErrorCode.ENOENT),
        (Clone(name="source", clone="a"), BOB, ErrorCode.EPERM),
        (Clone(name="source", clone="source"), ALICE, ErrorCode.EALREADY),
        (Clone(name="source", clone="a", count=2), ALICE, ErrorCode.EINVAL),
        (Clone(name="source", clone="a%d", count=4), ALICE, ErrorCode.EPERM),
    ):
        assert code(host.ask(request, uid)) == wanted
    assert host.told[source.id] == []
    assert [vm.name for vm in host.registry.vms] == ["source"]
    key = host.begin(Clone(name="source", clone="a%d", count=3), ALICE)
    host.capture(source)
    assert host.ask(Clone(name="source", clone="b"), ALICE) is not None  # a fourth
    assert key in host.pending


def test_what_has_happened_meanwhile_counts(host: Host) -> None:
    """A name that another user took while the VM was captured is refused then."""
    host.run(host.registry.load([SOURCE._replace(name="other")]))
    source = host.vm("source")
    key = host.begin(Clone(name="source", clone="late"), ALICE)
    host.run(host.registry.load([SOURCE._replace(name="late")]))
    host.capture(source)
    assert code(host.answers[key]) == ErrorCode.EALREADY
    assert source.state.phase is Phase.RUNNING


def test_some_clones_fail(host: Host) -> None:
    """The answer has running clones beside failed ones."""
    key = host.begin(Clone(name="source", clone="c%d", count=2), ALICE)
    host.capture(host.vm("source"))
    host.report(host.launch("c1"), Running())
    host.launches.remove(host.vm("c2").id)
    host.report(host.vm("c2"), LaunchFailed(ErrorCode.EAGAIN, "no process"))
    assert [(vm.name, vm.code, vm.message) for vm in told(host, key)] == [
        ("c1", "", ""),
        ("c2", "EAGAIN", "no process"),
    ]
    assert set(host.states()) == {"source", "c1"}


def test_a_vm_that_cannot_be_captured_goes_on(host: Host) -> None:
    """If its process fails, sends no memory, or ends, there is no clone, and the VM runs on."""
    source = host.vm("source")
    key = host.begin(Clone(name="source", clone="a"))
    host.report(source, SendFailed(ErrorCode.EIO, "no room"))
    assert code(host.answers[key]) == ErrorCode.EIO
    assert source.state.phase is Phase.RUNNING
    key = host.begin(Clone(name="source", clone="a"))
    host.end(source, Exited(None))
    assert code(host.answers[key]) == ErrorCode.EIO
    assert [vm.name for vm in host.registry.vms] == ["source"]


def test_the_same_serial_twice_is_two_requests(host: Host) -> None:
    """Two requests with the same serial are two requests."""
    host.run(host.registry.load([SOURCE._replace(name="other")]))
    run(host, "other")
    for source, name in (("source", "a"), ("other", "b")):
        host.run(host.registry.request(5, ROOT, Clone(name=source, clone=name, serial=7)))
    host.capture(host.vm("other"))
    host.capture(host.vm("source"))
    assert (host.vm("a").clone_of, host.vm("b").clone_of) == ("source", "other")
    host.leave(5)


def test_a_client_that_leaves_wants_no_clones(host: Host) -> None:
    """If the client leaves, a capture makes no clones; clones that start already continue."""
    source = host.vm("source")
    host.begin(Clone(name="source", clone="a"), client=3)
    host.leave(3)
    assert host.told[source.id] == ["CaptureVm", "CancelSendVm"]
    host.capture(source)
    assert set(host.states()) == {"source"}
    host.begin(Clone(name="source", clone="b"), client=4)
    host.capture(source)
    host.leave(4)
    host.report(host.launch("b"), Running())
    assert host.states() == {"source": State.RUNNING, "b": State.RUNNING}


def test_requests_at_once_share_a_capture(host: Host) -> None:
    """The VM is captured once for all who want clones meanwhile, also if the first one leaves."""
    source = host.vm("source")
    host.begin(Clone(name="source", clone="c%d"), client=3)
    second = host.begin(Clone(name="source", clone="c%d", count=2), client=4)
    third = host.begin(Clone(name="source", clone="c1"), client=5)
    host.leave(3)
    host.capture(source)
    assert host.told[source.id] == ["CaptureVm"]
    assert set(host.states()) == {"source", "c1", "c2"}
    assert code(host.answers[third]) == ErrorCode.EALREADY  # the name is taken meanwhile
    for name in ("c1", "c2"):
        host.report(host.launch(name), Running())
    assert [vm.name for vm in told(host, second)] == ["c1", "c2"]
    assert source.state.phase is Phase.RUNNING


def test_a_capture_that_fails_fails_for_all(host: Host) -> None:
    """Each request is answered, and the last one that leaves cancels the capture."""
    source = host.vm("source")
    keys = [host.begin(Clone(name="source", clone=name)) for name in ("a", "b")]
    host.report(source, SendFailed(ErrorCode.EIO, "no room"))
    assert [code(host.answers[key]) for key in keys] == [ErrorCode.EIO] * 2
    for client in (3, 4):
        host.begin(Clone(name="source", clone=f"c{client}"), client=client)
    host.leave(4)
    assert host.told[source.id] == ["CaptureVm", "CaptureVm"]
    host.leave(3)
    assert host.told[source.id] == ["CaptureVm", "CaptureVm", "CancelSendVm"]
    host.capture(source)
    assert set(host.states()) == {"source"}


def test_only_so_many_requests_wait_for_a_capture(host: Host) -> None:
    """One more is refused, and the others get their clones."""
    source = host.vm("source")
    for number in range(CAPTURE_REQUESTS_MAX):
        host.begin(Clone(name="source", clone=f"c{number}"))
    assert code(host.ask(Clone(name="source", clone="more"))) == ErrorCode.EAGAIN
    host.capture(source)
    assert len(host.states()) == 1 + CAPTURE_REQUESTS_MAX


def test_nothing_is_kept_without_need(host: Host) -> None:
    """The capture is freed when its last clone has started and its source runs."""
    before = set(Path("/proc/self/fd").iterdir())
    host.begin(Clone(name="source", clone="a"))
    host.capture(host.vm("source"))
    assert len(set(Path("/proc/self/fd").iterdir()) - before) >= 2
    host.report(host.launch("a"), Running())
    gc.collect()
    assert set(Path("/proc/self/fd").iterdir()) <= before


def test_a_clone_that_is_to_stop_is_told_of(host: Host) -> None:
    """If a starting clone is stopped by any user, its requester gets an answer."""
    key = host.begin(Clone(name="source", clone="a"))
    host.capture(host.vm("source"))
    host.begin(Stop(name="a", force=True), client=2)
    assert [vm.code for vm in told(host, key)] == ["EINTR"]
    answer = host.ask(Start(name="source"))
    assert not isinstance(answer, Started)


@pytest.mark.parametrize("name", ["7", "7%d", "%d"])
def test_a_number_is_no_name(host: Host, name: str) -> None:
    """Verbs would look for an id."""
    assert code(host.ask(Clone(name="source", clone=name), ALICE)) == ErrorCode.EINVAL
    assert [vm.name for vm in host.registry.vms] == ["source"]
