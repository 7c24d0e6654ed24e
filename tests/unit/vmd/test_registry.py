"""The table of VMs: ids, owners, starting in turn, configurations that come and go."""

from __future__ import annotations

import pytest

from tests.unit.vmd.registry_host import ALICE, BOB, CAROL, ROOT, STAFF, Host, code
from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import (
    InterfaceConfig,
    Limits,
    Owner,
    Right,
    Staggered,
    VmConfig,
)
from vmd.rules.addressing import made_lladdr
from vmd.rules.registry import IDS_KEPT, Registry
from vmd.rules.vm_state import Exited, LaunchFailed, Paused, Running
from vmd.wire.internal import EndReason
from vmd.wire.messages import (
    Console,
    ConsoleOpened,
    Done,
    ErrorCode,
    EventKind,
    Failed,
    InterfaceRequest,
    Load,
    Log,
    ParentRequest,
    Pause,
    Reload,
    Reset,
    Start,
    Started,
    State,
    Status,
    Stop,
    Terminated,
    Unpause,
    Vms,
    Wait,
)
from vmd.wire.parts import DiskRequest
from vmm_kvm.boot_device import BootDevice

DISKS = (DiskRequest(path="/disk"),)
POWER_OFF = Exited(EndReason.POWER_OFF)
REBOOT = Exited(EndReason.REBOOT)


def a_config(name: str, *, disk: str = "", enabled: bool = False, **more: object) -> VmConfig:
    """Return a VM with one disk."""
    config = VmConfig(
        name,
        is_enabled=enabled,
        disks=(DiskOption(DiskKind.RAW, disk or f"/{name}.img"),),
        given=frozenset({Right.DISK}),
        where="vm.conf:3",
    )
    return config._replace(**more)  # type: ignore[arg-type] # fields by name


@pytest.fixture
def host() -> Host:
    """A host without VMs."""
    return Host()


def load(host: Host, *configs: VmConfig) -> list[str]:
    """Let the registry have a configuration; returns its earlier complaints."""
    complaints = host.registry.judge(configs)
    host.run(host.registry.load(configs))
    return complaints


def start(host: Host, name: str, uid: int = ROOT) -> int:
    """Start an existing VM, until it runs."""
    key = host.begin(Start(name=name), uid)
    host.report(host.launch(name), Running())
    answer = host.answers[key]
    assert isinstance(answer, Started)
    return answer.id


# Ids


def test_ids_stick_to_name_and_user(host: Host) -> None:
    """A name has the same id again for the same user, even after it was forgotten."""
    ids: dict[str, int] = {}
    for name in ("a", "b", "a", "c", "b"):
        key = host.begin(Start(name=name, disks=DISKS))
        host.report(host.launch(name), Running())
        answer = host.answers[key]
        assert isinstance(answer, Started)
        assert ids.setdefault(name, answer.id) == answer.id
        host.end(answer.id, POWER_OFF)
        host.clock.now += 10
    assert ids == {"a": 1, "b": 2, "c": 3}
    assert host.registry.vms == ()


def test_two_vms_with_one_lladdr_do_not_run_on_one_switch(host: Host) -> None:
    """A VM does not start while a copy of it has its lladdr on its switch; then it does."""
    lan = InterfaceConfig(switch="lan", lladdr="fe:e1:bb:d1:00:01")
    own = InterfaceConfig(is_local=True, lladdr="fe:e1:bb:d1:00:02")
    load(
        host,
        a_config("web", interfaces=(own, lan)),
        a_config("copy", interfaces=(lan, own)),
        a_config("other", interfaces=(lan._replace(switch="wan"), own)),
    )
    vm_id = start(host, "copy")
    start(host, "other")
    answer = host.answers[host.begin(Start(name="web"))]
    assert isinstance(answer, Failed)
    assert (answer.code, answer.message) == (
        ErrorCode.EBUSY,
        "interface 1: copy has its lladdr, on switch lan",
    )
    host.end(vm_id, POWER_OFF)
    host.clock.now += 10
    start(host, "web")


def test_a_failed_start_uses_no_id(host: Host) -> None:
    """Failed starts under any number of names use up no ids and no addresses."""
    for number in range(2000):
        host.begin(Start(name=f"x{number}", disks=DISKS))
        host.launches.remove(1)
        host.report(1, LaunchFailed(ErrorCode.DISK_MISSING, "no disk"))
    assert host.registry.vms == ()


def test_ids_of_forgotten_vms_are_used_again(host: Host) -> None:
    """Ids of the latest names are reserved for them, a limited number."""
    ids = []
    for number in [*range(IDS_KEPT + 100), 0, IDS_KEPT + 99]:
        host.begin(Start(name=f"x{number}", disks=DISKS))
        vm = host.launch(f"x{number}")
        host.report(vm, Running())
        ids.append(vm.id)
        host.end(vm, POWER_OFF)
        host.clock.now += 10
    assert max(ids) <= IDS_KEPT + 2
    assert ids[-1] == ids[IDS_KEPT + 99]


def test_what_one_user_may_have_is_limited(host: Host) -> None:
    """A user's VMs, vCPUs and memory are limited together; root's and other users' are not."""
    everyone = Owner(None, STAFF)
    rights = frozenset({Right.DISK, Right.MEMORY, Right.CPUS})
    base = a_config("base", allow_instance=rights, instance_owner=everyone._replace(uid=ALICE))
    load(host, base)
    host.registry.limits = Limits(vms=2, cpus=5, memory=3 << 30)

    def begin(
        name: str, uid: int = ALICE, *, memory: int | None = None, cpus: int | None = None
    ) -> str:
        request = Start(name=name, instance="base", disks=DISKS, memory=memory, cpus=cpus)
        key = host.begin(request, uid)
        answer = host.answers.get(key)
        return answer.message if isinstance(answer, Failed) else ""

    assert begin("a", memory=2 << 30) == ""
    assert begin("b", memory=2 << 30) == "limit of 3.0G memory of one user's VMs"
    assert begin("b", cpus=5) == "limit of 5 vCPUs of one user's VMs"
    assert begin("b") == ""
    assert begin("c") == "limit of 2 VMs of one user"
    assert begin("c", BOB) == ""
    assert begin("d", ROOT, cpus=60) == ""
    vm_id = host.vm("a").id
    host.launches.remove(vm_id)
    host.report(vm_id, LaunchFailed(ErrorCode.DISK_MISSING, "no disk"))
    assert begin("c2") == ""


def test_another_user_gets_another_id(host: Host) -> None:
    """The same name is another VM for another user."""
    everyone = Owner(None, STAFF)
    load(
        host,
        a_config(
            "base",
            allow_instance=frozenset({Right.DISK}),
            instance_owner=everyone._replace(uid=ALICE),
        ),
    )
    ids = []
    for uid in (ALICE, BOB, ALICE, ROOT):
        host.begin(Start(name="x", instance="base", disks=DISKS), uid)
        vm = host.launch("x")
        host.report(vm, Running())
        ids.append(vm.id)
        host.end(vm, POWER_OFF)
        host.clock.now += 10
    assert ids == [2, 3, 2, 4]


def test_a_reset_forgets_ids(host: Host) -> None:
    """After a reset numbers start at one; the answer comes when all is gone."""
    load(host, a_config("a"), a_config("b", enabled=True))
    vm = host.launch("b")
    host.report(vm, Running())
    host.operations.clear()
    reset = host.begin(Reset())
    (operation,) = host.operations
    host.run(host.registry.remove_all(operation.ticket))
    assert host.states() == {"b": State.STOPPING}
    assert host.told[vm.id] == ["KillVm"]
    assert code(host.ask(Start(name="c", disks=DISKS))) == ErrorCode.EAGAIN
    assert code(host.ask(Reload())) == ErrorCode.EAGAIN
    assert reset not in host.answers
    host.end(vm, Exited(None))
    assert host.answers[reset] == Done(serial=reset[1])
    load(host, a_config("z"))
    assert host.vm("z").id == 1


def test_a_reset_without_vms_is_answered_at_once(host: Host) -> None:
    """Without VMs there is nothing to wait for; the client may also have left."""
    reset = host.begin(Reset())
    host.run(host.registry.remove_all(host.operations[0].ticket))
    assert host.answers[reset] == Done(serial=reset[1])
    load(host, a_config("a", enabled=True))
    host.launch("a")
    host.begin(Reset(), client=2)
    host.run(host.registry.remove_all(host.operations[1].ticket))
    host.leave(2)
    host.end(host.vm("a"), Exited(None))
    assert not host.registry.is_emptying


# Starting, stopping


def test_the_life_of_a_vm_of_a_configuration(host: Host) -> None:
    """A VM of the configuration is started, paused, unpaused, stopped, and stays known."""
    load(host, a_config("web"))
    assert start(host, "web") == 1
    pausing = host.begin(Pause(name="web"))
    assert pausing not in host.answers
    host.report(1, Paused())
    assert host.answers[pausing] == Done(serial=pausing[1], id=1)
    assert host.states() == {"web": State.PAUSED}
    waiter = host.begin(Wait(id=1), client=2)
    stop = host.ask(Stop(id=1))
    assert isinstance(stop, Done)
    assert host.told[1] == ["PauseVm", "UnpauseVm", "StopVm"]
    host.end(1, Exited(EndReason.STOPPED))
    assert isinstance(host.answers[waiter], Terminated)
    assert host.states() == {"web": State.STOPPED}


def test_a_vm_of_vmctl_vanishes(host: Host) -> None:
    """A VM made by a command is forgotten when it ends; its defaults are OpenBSD's."""
    host.begin(Start(name="web", disks=DISKS, interfaces=(InterfaceRequest(is_local=True),)))
    vm = host.launch("web")
    assert (vm.config.memory, vm.config.cpus) == (512 << 20, 1)
    lladdr = made_lladdr(b"host", ROOT, "web", 0, ())
    assert vm.config.interfaces == (InterfaceConfig(is_local=True, lladdr=lladdr),)
    host.end(vm, POWER_OFF)
    assert host.registry.vms == ()


def test_a_reboot_keeps_id_terminal_and_addresses(host: Host) -> None:
    """A reboot is a new process of the same VM; clients that wait for its end get an answer."""
    load(host, a_config("web", interfaces=(InterfaceConfig(), InterfaceConfig())))
    start(host, "web")
    before = host.vm("web").config.interfaces
    waiters = [host.begin(Wait(name="web"), client=client) for client in (2, 3)]
    host.clock.now += 60
    host.end(1, REBOOT)
    assert [type(host.answers[key]) for key in waiters] == [Terminated, Terminated]
    vm = host.launch("web")
    host.report(vm, Running())
    assert (vm.id, vm.state.tty, vm.config.interfaces) == (1, "/dev/pts/1", before)
    assert [one.lladdr for one in before] == [
        made_lladdr(b"host", ROOT, "web", index, ()) for index in range(2)
    ]


def test_an_explicit_boot_device_stops_at_reboot(host: Host) -> None:
    """As in OpenBSD, a VM with a boot device stops at a reboot."""
    load(host, a_config("web", boot_device=BootDevice.CDROM))
    start(host, "web")
    host.end(1, REBOOT)
    assert host.states() == {"web": State.STOPPED}


def test_resources_that_cannot_be_opened_fail_the_start(host: Host) -> None:
    """If resources cannot be opened the starter gets the reason."""
    load(host, a_config("web"))
    host.failing.add(1)
    assert code(host.ask(Start(name="web"))) == ErrorCode.DISK_MISSING
    assert host.states() == {"web": State.STOPPED}


def test_a_start_may_be_stopped(host: Host) -> None:
    """The starter is told of the interruption, the stopper of the end."""
    load(host, a_config("web"))
    starter = host.begin(Start(name="web"))
    stopper = host.begin(Stop(name="web", force=True, wait=True), client=2)
    assert code(host.answers[starter]) == ErrorCode.EINTR
    host.launches.remove(1)
    host.report(1, LaunchFailed(ErrorCode.ENOMEM))
    assert isinstance(host.answers[stopper], Terminated)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Start(name="web"), ErrorCode.EALREADY),
        (Start(id=1), ErrorCode.EALREADY),
        (Start(id=9), ErrorCode.ENOENT),
        (Start(name="none"), ErrorCode.ENOENT),
        (Start(name="idle", memory=1 << 30), ErrorCode.EALREADY),
        (Start(name="idle", append="single"), ErrorCode.EALREADY),
        (Start(name="-x", disks=DISKS), ErrorCode.EINVAL),
        (Start(name="x" * 64, disks=DISKS), ErrorCode.EINVAL),
        (Start(name="", disks=DISKS), ErrorCode.EINVAL),
        (Start(name="x", memory=1 << 30), ErrorCode.EINVAL),
        (Start(name="x", disks=DISKS * 5), ErrorCode.EINVAL),
        (Start(name="x", disks=DISKS, cpus=65), ErrorCode.EINVAL),
        (Start(name="x", disks=(DiskRequest(path="/x", format="vmdk"),)), ErrorCode.EINVAL),
        (Start(name="x", instance="none", disks=DISKS), ErrorCode.TEMPLATE_INVALID),
        (Start(name="idle", instance="web", disks=DISKS), ErrorCode.EPROCLIM),
        (Stop(name="idle"), ErrorCode.NOT_RUNNING),
        (Wait(name="idle"), ErrorCode.NOT_RUNNING),
        (Pause(id=2), ErrorCode.NOT_RUNNING),
        (Unpause(id=2), ErrorCode.NOT_RUNNING),
        (Console(name="idle"), ErrorCode.NOT_RUNNING),
        *((kind(name="none"), ErrorCode.ENOENT) for kind in (Stop, Wait, Pause, Unpause, Console)),
        (Stop(), ErrorCode.ENOENT),
    ],
    ids=repr,
)
def test_what_cannot_be_is_refused(
    host: Host, request_: ParentRequest, expected: ErrorCode
) -> None:
    """With web running and idle stopped, root gets the reason."""
    load(host, a_config("web"), a_config("idle"))
    start(host, "web")
    assert code(host.ask(request_)) == expected
    assert host.states() == {"web": State.RUNNING, "idle": State.STOPPED}


# Other kernels


def test_a_kernel_for_one_boot(host: Host) -> None:
    """A configured VM boots another kernel once: not after a reboot, nor at another start."""
    load(host, a_config("web"))
    host.begin(Start(name="web", kernel=0), with_kernel=True)
    (kernel,) = host.boots
    host.report(host.launch("web"), Running())
    host.clock.now += 60
    host.end(1, REBOOT)
    assert host.booted == [(1, kernel), (1, None)]
    assert host.boots == set()


def test_a_kernel_of_a_vm_of_vmctl_is_its_own(host: Host) -> None:
    """A VM made with a kernel boots it every time."""
    host.begin(Start(name="web", kernel=0), with_kernel=True)
    (kernel,) = host.boots
    host.report(host.launch("web"), Running())
    host.clock.now += 60
    host.end(1, REBOOT)
    assert host.booted == [(1, kernel), (1, kernel)]
    host.launch("web")
    host.end(1, POWER_OFF)
    assert host.boots == set()


def test_a_kernel_that_is_not_booted_is_closed(host: Host) -> None:
    """A refused start keeps no descriptor."""
    load(host, a_config("web"))
    start(host, "web")
    host.ask(Start(name="web", kernel=0), with_kernel=True)
    host.ask(Start(name="web", kernel=0), CAROL, with_kernel=True)
    host.ask(Stop(name="web"), with_kernel=True)
    host.end(1, POWER_OFF)
    for _ in range(4):  # until it is refused as too quick
        host.ask(Start(name="web", kernel=0), with_kernel=True)
        if host.launches:
            host.launch("web")
            host.end(1, POWER_OFF)
    assert host.boots == set()


# Rights


def test_only_owners_command_a_vm(host: Host) -> None:
    """The VM's user, its group, and root command it; every user sees it."""
    load(host, a_config("web", owner=Owner(ALICE, STAFF)))
    for uid, may in ((ALICE, True), (BOB, True), (CAROL, False), (ROOT, True)):
        answer = host.ask(Status(), uid)
        assert isinstance(answer, Vms)
        assert len(answer.vms) == 1
        key = host.begin(Start(name="web"), uid)
        if not may:
            assert code(host.answers[key]) == ErrorCode.EPERM
            continue
        host.report(host.launch("web"), Running())
        assert isinstance(host.ask(Console(name="web"), uid), ConsoleOpened)
        for kind in (Pause, Unpause, Wait, Stop, Console):
            assert code(host.ask(kind(name="web"), CAROL)) == ErrorCode.EPERM
        host.end(1, POWER_OFF)
        host.clock.now += 10


@pytest.mark.parametrize("request_", [Load(path="/x"), Reload(), Reset(), Log(level=2)])
def test_only_root_commands_the_daemon(host: Host, request_: Load | Reload | Reset | Log) -> None:
    """Other users are refused; the parent process carries out root's requests."""
    assert code(host.ask(request_, ALICE)) == ErrorCode.EPERM
    assert host.ask(request_) is None
    assert type(host.operations[0].request) is type(request_)


def test_ordinary_users_make_no_vms(host: Host) -> None:
    """Users start their own VMs, or instances that they may make."""
    assert code(host.ask(Start(name="x", disks=DISKS), ALICE)) == ErrorCode.EPERM
    assert code(host.ask(Start(name="x"), ALICE)) == ErrorCode.EPERM


def test_an_instance_is_its_makers(host: Host) -> None:
    """Alice makes an instance, which is hers, and whose disk is opened with her rights."""
    load(
        host,
        a_config(
            "base",
            memory=1 << 30,
            allow_instance=frozenset({Right.DISK}),
            instance_owner=Owner(ALICE),
        ),
    )
    host.begin(Start(name="hers", instance="base", disks=DISKS), ALICE)
    vm = host.launch("hers")
    assert vm.config.owner == Owner(ALICE)
    assert vm.config.memory == 1 << 30
    assert vm.checked == {Right.DISK}
    assert vm.requester == ALICE
    assert host.vm("base").checked == frozenset()
    denied = host.ask(Start(name="more", instance="base", memory=2 << 30), ALICE)
    assert code(denied) == ErrorCode.EPERM


# In turn


def test_vms_start_in_turn(host: Host) -> None:
    """A few VMs start at once, in order, the next ones later; disabled ones never."""
    host.registry.staggered = Staggered(2, 30)
    load(host, *(a_config(name, enabled=name != "c") for name in "abcdef"))
    waiting, starting, stopped = State.WAITING, State.STARTING, State.STOPPED
    assert list(host.states().values()) == [starting, starting, stopped, *[waiting] * 3]
    assert host.turn_at == host.clock.now + 30
    host.wait_for_turn()
    assert list(host.states().values()) == [*[starting] * 2, stopped, *[starting] * 2, waiting]
    host.wait_for_turn()
    assert [host.turn_at] == [None]
    assert host.launches == [1, 2, 4, 5, 6]


def test_a_manual_start_ends_the_waiting(host: Host) -> None:
    """A VM started or stopped by hand does not start again in its turn."""
    host.registry.staggered = Staggered(1, 30)
    load(host, *(a_config(name, enabled=True) for name in "abc"))
    start(host, "c")
    host.end(host.vm("c"), POWER_OFF)
    host.wait_for_turn()
    assert host.launches == [1, 2]
    assert host.states()["c"] is State.STOPPED
    assert host.turn_at is None


def test_a_failed_start_does_not_hold_up_the_others(host: Host) -> None:
    """A failed start does not delay the others; a parallelism of none counts as one."""
    host.registry.staggered = Staggered(0, 5)
    host.failing.add(1)
    load(host, *(a_config(name, enabled=True) for name in "ab"))
    assert host.states() == {"a": State.STOPPED, "b": State.WAITING}
    host.wait_for_turn()
    assert host.launches == [2]


# Configurations


def test_a_reload_leaves_running_vms_alone(host: Host) -> None:
    """Running VMs keep their properties; the others get those of the file, with their ids."""
    load(host, a_config("a"), a_config("b"), a_config("c"))
    start(host, "b")
    host.run(host.registry.forget_idle())
    assert host.states() == {"b": State.RUNNING}
    load(host, a_config("c", disk="/new.img"), a_config("b", disk="/new.img"), a_config("d"))
    assert [(vm.id, vm.name) for vm in host.registry.vms] == [(2, "b"), (3, "c"), (4, "d")]
    assert host.vm("b").config.disks[0].path == "/b.img"
    assert host.vm("c").config.disks[0].path == "/new.img"
    host.end(host.vm("b"), POWER_OFF)
    assert host.states()["b"] is State.STOPPED


def test_a_reload_brings_interfaces_up_and_down(host: Host) -> None:
    """Links of running VMs follow the file, unless the number of interfaces differs."""
    up, down = InterfaceConfig(mtu=1400), InterfaceConfig(mtu=9000, is_up=False)
    load(host, a_config("a", interfaces=(up, up)))
    start(host, "a")
    load(host, a_config("a", interfaces=(down, up)))
    found = host.vm("a").config.interfaces
    assert [(one.is_up, one.mtu) for one in found] == [(False, 1400), (True, 1400)]
    load(host, a_config("a", interfaces=(up,)))
    assert host.vm("a").config.interfaces == found


def test_a_configuration_is_complained_about(host: Host) -> None:
    """VMs that cannot be registered are reported with their place; the rest is registered."""
    complaints = load(
        host,
        a_config("_bad"),
        a_config("good"),
        a_config("good"),
        a_config("i", parent="none"),
        VmConfig("nothing", where="vm.conf:9"),
    )
    assert complaints == [
        'vm.conf:3: vm "_bad" failed: invalid VM name',
        'vm.conf:3: vm "i" failed: no VM "none"',
        'vm.conf:9: vm "nothing" failed: invalid configuration, no devices',
    ]
    assert host.states() == {"good": State.STOPPED}


def test_judging_changes_nothing(host: Host) -> None:
    """Checking a configuration registers nothing, and causes no events."""
    load(host, a_config("runs"), a_config("idle", is_enabled=False))
    before = host.states()
    wanted = (a_config("new"), a_config("child", parent="idle"))
    assert host.registry.judge(wanted) == []
    assert host.registry.judge(wanted, keeps_idle=False) == [
        'vm.conf:3: vm "child" failed: no VM "idle"'
    ]
    assert host.states() == before


def test_instances_of_a_configuration(host: Host) -> None:
    """An instance in the file inherits from a VM above it."""
    load(
        host,
        a_config("base", memory=1 << 30, boot="/bsd", owner=Owner(ALICE, STAFF)),
        a_config("one", parent="base", given=frozenset({Right.INSTANCE, Right.DISK})),
    )
    config = host.vm("one").config
    assert (config.memory, config.boot, config.owner) == (1 << 30, "/bsd", Owner(ALICE, STAFF))


# Telling


def test_vms_are_listed_in_openbsds_order(host: Host) -> None:
    """Running VMs are listed first, the latest foremost; then the others in their order."""
    load(host, *(a_config(name) for name in "abcd"))
    for name in "bd":
        start(host, name)
        host.clock.now += 1
    answer = host.ask(Status())
    assert isinstance(answer, Vms)
    assert [vm.name for vm in answer.vms] == ["d", "b", "a", "c"]
    assert [vm.pid for vm in answer.vms] == [102, 101, None, None]
    assert [vm.started_at for vm in answer.vms] == [1e9 + 1001, 1e9 + 1000, None, None]
    for request in (Status(name="c"), Status(id=3)):
        answer = host.ask(request)
        assert isinstance(answer, Vms)
        assert [vm.name for vm in answer.vms] == ["c"]
    none = host.ask(Status(name="none"))
    assert isinstance(none, Vms)
    assert none.vms == ()


def test_events_are_told_in_order(host: Host) -> None:
    """Events of a VM are sent as they happen, with the reason, with and without listeners."""
    load(host, a_config("web"))
    start(host, "web")
    host.end(1, Exited(EndReason.CRASHED, message="the guest panicked"))
    assert [(one.kind, one.name, one.message) for one in host.events] == [
        (EventKind.REGISTERED, "web", ""),
        (EventKind.STARTING, "web", ""),
        (EventKind.STARTED, "web", ""),
        (EventKind.FAILED, "web", "the guest panicked"),
    ]


def test_reports_about_unknown_vms_are_nothing() -> None:
    """A report about a VM that has been forgotten is ignored."""
    registry: Registry = Host().registry
    assert registry.report(77, Exited(None)) == []


@pytest.mark.parametrize(
    "lent",
    [{"boot": "/bsd.rd"}, {"firmware": "bios"}, {"cdrom": "/x.iso"}],
    ids=["kernel", "firmware", "cdrom"],
)
def test_an_instance_may_have_all_of_its_template(host: Host, lent: dict[str, str]) -> None:
    """Without options of its own an instance equals its template, if that boots without a disk."""
    template = a_config("t")._replace(**lent)  # type: ignore[arg-type] # fields by name
    load(host, template)
    key = host.begin(Start(name="new", instance="t"))
    host.report(host.launch("new"), Running())
    assert isinstance(host.answers[key], Started)


def test_an_instance_that_could_not_boot_says_so(host: Host) -> None:
    """A template's disks are not inherited: without anything else, that is the complaint."""
    load(host, a_config("t"))
    answer = host.answers[host.begin(Start(name="new", instance="t"))]
    assert isinstance(answer, Failed)
    assert (answer.code, answer.message) == ("EINVAL", "no kernel or disk/cdrom specified")
