"""Rights: owners, names, limits, and an instance's part of its template."""

from __future__ import annotations

import pytest

from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import ForwardConfig, InterfaceConfig, Owner, Right, VmConfig
from vmd.rules.policy import Denied, Users, check_vm, is_name, make_instance
from vmd.wire.messages import ErrorCode

ROOT, ALICE, BOB, CAROL = 0, 1001, 1002, 1003
STAFF, WHEEL = 50, 0
USERS = Users(frozenset({ROOT}), lambda uid, gid: (uid, gid) == (BOB, STAFF))
DISK = DiskOption(DiskKind.RAW, "/own.img")

TEMPLATE = VmConfig(
    "base",
    memory=1 << 30,
    cpus=2,
    boot="/bsd",
    initrd=("/ramdisk",),
    append="quiet",
    disks=(DiskOption(DiskKind.RAW, "/base.img"),),
    cdrom="/base.iso",
    interfaces=(
        InterfaceConfig(tap="tap3", lladdr="fe:e1:bb:d1:00:01", switch="uplink"),
        InterfaceConfig(is_local=True),
    ),
    owner=Owner(ALICE, STAFF),
    instance_owner=Owner(BOB),
)


def instance(wanted: VmConfig, uid: int = BOB, *rights: Right) -> VmConfig | Denied:
    """Make an instance of the template, which grants `rights`."""
    template = TEMPLATE._replace(allow_instance=frozenset(rights))
    return make_instance(template, wanted, uid, USERS)


@pytest.mark.parametrize(
    ("uid", "owner", "may"),
    [
        (ROOT, None, True),
        (ALICE, None, False),
        (ALICE, Owner(ALICE), True),
        (ALICE, Owner(BOB), False),
        (BOB, Owner(ALICE, STAFF), True),
        (CAROL, Owner(ALICE, STAFF), False),
        (CAROL, Owner(None, None), False),
        (BOB, Owner(ALICE, WHEEL), False),
    ],
)
def test_owners(uid: int, owner: Owner | None, may: bool) -> None:
    """Root, the owner, and members of the owning group may control a VM."""
    assert USERS.may(uid, owner) is may


@pytest.mark.parametrize(
    ("name", "is_good"),
    [
        *(("web", True), ("7up", True), ("a.b-c_d", True), ("x" * 63, True)),
        *(("", False), ("-a", False), (".a", False), ("_a", False), ("a b", False)),
        *(("x" * 64, False), ("é", False), ("a/b", False), ("a\n", False), ("\u0661", False)),
    ],
)
def test_names(name: str, is_good: bool) -> None:
    """Names are letters, digits, and three marks that cannot come first; 63 bytes at most."""
    assert is_name(name) is is_good


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (VmConfig("x"), "invalid configuration, no devices"),
        (
            VmConfig("x", "template", given=frozenset({Right.INSTANCE})),
            "no kernel or disk/cdrom specified",
        ),
        (
            VmConfig("x", memory=1 << 30, given=frozenset({Right.MEMORY})),
            "no kernel or disk/cdrom specified",
        ),
        (
            VmConfig("x", boot="/bsd", memory=1 << 40, given=frozenset({Right.BOOT})),
            "invalid memory size",
        ),
    ],
)
def test_vms_that_cannot_be(config: VmConfig, why: str) -> None:
    """A VM without anything to boot, or outside the limits, is refused."""
    denied = check_vm(config)
    assert denied is not None
    assert denied.message == why


def test_a_kernel_is_enough() -> None:
    """Unlike in OpenBSD, a kernel and nothing else is enough."""
    assert check_vm(VmConfig("x", boot="/bsd", given=frozenset({Right.BOOT}))) is None
    assert check_vm(VmConfig("x", given=frozenset({Right.BOOT})), has_kernel=True) is None


def test_what_an_instance_inherits() -> None:
    """An instance inherits all but disks, tap and lladdr, which only one VM can have."""
    made = instance(VmConfig("i", parent="base", owner=Owner(BOB)))
    assert made == VmConfig(
        "i",
        parent="base",
        memory=1 << 30,
        cpus=2,
        boot="/bsd",
        initrd=("/ramdisk",),
        append="quiet",
        cdrom="/base.iso",
        interfaces=(InterfaceConfig(switch="uplink"), InterfaceConfig(is_local=True)),
        owner=Owner(BOB, STAFF),
    )


def test_an_instance_of_nobody_is_its_templates_owners() -> None:
    """Without an owner of its own, an instance has its template's."""
    made = instance(VmConfig("i", parent="base"), ROOT)
    assert isinstance(made, VmConfig)
    assert made.owner == TEMPLATE.owner


@pytest.mark.parametrize(
    ("wanted", "right", "word"),
    [
        (VmConfig("i", memory=2 << 30), Right.MEMORY, "memory"),
        (VmConfig("i", cpus=4), Right.CPUS, "cpus"),
        (VmConfig("i", disks=(DISK,)), Right.DISK, "disks"),
        (VmConfig("i", interfaces=(InterfaceConfig(),)), Right.INTERFACE, "interfaces"),
        (
            VmConfig("i", interfaces=(InterfaceConfig(switch="other"), InterfaceConfig())),
            Right.INTERFACE,
            "interfaces",
        ),
        (
            VmConfig("i", interfaces=(InterfaceConfig(is_local=True), InterfaceConfig())),
            Right.INTERFACE,
            "interfaces",
        ),
        (VmConfig("i", boot="/x", given=frozenset({Right.BOOT})), Right.BOOT, "boot image"),
        (VmConfig("i", cdrom="/x"), Right.CDROM, "cdrom"),
    ],
)
def test_rights_of_instances(wanted: VmConfig, right: Right, word: str) -> None:
    """An instance may differ in what the template allows, and root's in all."""
    assert instance(wanted) == Denied(ErrorCode.EPERM, f'vm "i" no permission to set {word}')
    assert isinstance(instance(wanted, BOB, right), VmConfig)
    assert isinstance(instance(wanted, ROOT), VmConfig)


@pytest.mark.parametrize(
    "wanted",
    [
        VmConfig("i", memory=1 << 30, cpus=2),
        VmConfig("i", interfaces=(InterfaceConfig(), InterfaceConfig())),
    ],
)
def test_what_does_not_differ_needs_no_right(wanted: VmConfig) -> None:
    """A value equal to the template's needs no right."""
    assert isinstance(instance(wanted), VmConfig)


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        (VmConfig("i", disks=TEMPLATE.disks), "disk /base.img"),
        (VmConfig("i", interfaces=(InterfaceConfig(tap="tap3"),)), "interface tap3"),
        (VmConfig("i", interfaces=(InterfaceConfig(lladdr="fe:e1:bb:d1:00:01"),)), "lladdr"),
    ],
)
def test_what_is_the_templates_cannot_be_reused(wanted: VmConfig, what: str) -> None:
    """Disks, taps and lladdrs of the template cannot be reused, not even by root."""
    assert instance(wanted, ROOT) == Denied(ErrorCode.EBUSY, f'vm "i" {what} cannot be reused')


def test_forwarded_ports_are_an_administrators() -> None:
    """Ports of the host cannot be granted by a template: only administrators forward them."""
    local = InterfaceConfig(is_local=True, forwards=(ForwardConfig("tcp", 80, 80),))
    wanted = VmConfig("i", parent="base", interfaces=(InterfaceConfig(), local))
    denied = Denied(ErrorCode.EPERM, 'vm "i" no permission to forward ports')
    assert instance(wanted, BOB, *Right) == denied
    made = instance(wanted, ROOT)
    assert isinstance(made, VmConfig)
    assert made.interfaces[1].forwards == local.forwards


def test_who_may_make_instances() -> None:
    """The instance owner and root may make instances; without an instance owner, root alone."""
    wanted = VmConfig("i")
    assert instance(wanted, CAROL) == Denied(
        ErrorCode.EPERM, 'vm "base" no permission to create vm instance'
    )
    template = TEMPLATE._replace(instance_owner=None)
    assert isinstance(make_instance(template, wanted, ALICE, USERS), Denied)
    assert isinstance(make_instance(template, wanted, ROOT, USERS), VmConfig)


def test_instances_belong_to_nobody_else() -> None:
    """An instance belongs to its maker, or to its template's owner."""
    assert instance(VmConfig("i", owner=Owner(CAROL))) == Denied(
        ErrorCode.EPERM, 'vm "i" user mismatch'
    )
    assert isinstance(instance(VmConfig("i", owner=Owner(ALICE))), VmConfig)


def test_permissions_are_inherited_only_as_a_right() -> None:
    """An instance cannot name its own; it has its template's if that says `instance`."""
    assert instance(VmConfig("i", allow_instance=frozenset({Right.DISK}))) == Denied(
        ErrorCode.EPERM, 'vm "i" cannot change instance permissions'
    )
    lent = instance(VmConfig("i"), BOB, Right.INSTANCE, Right.DISK)
    assert isinstance(lent, VmConfig)
    assert lent.allow_instance == {Right.INSTANCE, Right.DISK}
    assert lent.instance_owner == Owner(BOB)
    plain = instance(VmConfig("i"), BOB, Right.DISK)
    assert isinstance(plain, VmConfig)
    assert (plain.allow_instance, plain.instance_owner) == (frozenset(), None)
