"""Shared directories of VMs: who may have them, and what is refused with them; decisions alone."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.unit.vmd.registry_host import ALICE, BOB, ROOT, Host
from tests.unit.vmd.test_copies import CONFIG, REQUEST, USERS
from vmd.config.model import Owner, Right, VmConfig
from vmd.config.shares import ShareOption
from vmd.rules.cloning import clone_config
from vmd.rules.policy import Denied, check_vm
from vmd.rules.transfers import received_vm, sink_of
from vmd.rules.vm import Passed, Vm
from vmd.rules.vm_state import Phase, Ticket, VmState
from vmd.wire.messages import ErrorCode, Failed, Start
from vmd.wire.parts import ShareRequest
from vmd.wire.transfers import Send, Snapshot
from vmm_kvm.limits import SHARES_MAX

OPTION = ShareOption("/home/bob/src", "src", is_read_only=True)
ASKED = ShareRequest(path="/home/bob/src", tag="src", is_read_only=True)
TEMPLATE = VmConfig(
    "template",
    memory=1 << 28,
    boot="/k",
    shares=(ShareOption("/srv/www", "www"),),
    instance_owner=Owner(BOB),
    given=frozenset({Right.BOOT, Right.SHARE}),
)
NOT_SAVED = "share src: what its guest has open there cannot be saved"


def sharing(phase: Phase = Phase.RUNNING) -> Vm:
    """Return a VM of alice's that shares a directory."""
    config = VmConfig("web", shares=(OPTION,), owner=Owner(ALICE), allow_snapshot=True)
    return Vm(config, VmState(1, phase=phase), ROOT)


@pytest.mark.parametrize("is_allowed", [False, True])
def test_instances(is_allowed: bool) -> None:
    """An instance has none of its template's; others of its maker's if the template allows them."""
    rights = frozenset({Right.SHARE} if is_allowed else ())
    host = Host()
    host.run(host.registry.load((TEMPLATE._replace(allow_instance=rights),)))
    host.ask(Start(name="plain", instance="template"), BOB)
    assert host.vm("plain").config.shares == ()
    answer = host.ask(Start(name="own", instance="template", shares=(ASKED,)), BOB)
    if is_allowed:
        assert host.vm("own").config.shares == (OPTION,)
    else:
        assert isinstance(answer, Failed)
        assert answer.message == 'vm "own" no permission to set shares'


def test_a_vm_gets_none_by_being_started() -> None:
    """A configured VM keeps its shares."""
    host = Host()
    host.run(host.registry.load((TEMPLATE._replace(is_enabled=False),)))
    answer = host.ask(Start(name="template", shares=(ASKED,)))
    assert isinstance(answer, Failed)
    assert answer.code == ErrorCode.EALREADY
    assert host.vm("template").config.shares == TEMPLATE.shares


def test_what_cannot_be() -> None:
    """Too many, or two with one tag, are refused whoever asks."""
    many = tuple(ShareOption("/x", str(number)) for number in range(SHARES_MAX + 1))
    for shares, text in (
        (many, "invalid number of shares"),
        ((OPTION, OPTION), "two shares have the tag src"),
    ):
        assert check_vm(TEMPLATE._replace(shares=shares)) == Denied(ErrorCode.EINVAL, text)


def test_such_a_vm_is_not_saved() -> None:
    """It is not sent, written into a snapshot or cloned; the refusal names the share."""
    ticket = Ticket(1, 2)
    for request in (Snapshot(snapshot="one"), Send(stream=0)):
        passed = Passed(uid=ROOT, stream=9)
        denied = sink_of(sharing(), request, passed, ticket=ticket, uid=ROOT, users=USERS)
        assert denied == Denied(ErrorCode.EBUSY, NOT_SAVED)
    assert clone_config(sharing()) == Denied(ErrorCode.EINVAL, NOT_SAVED)


def test_no_snapshot_fits() -> None:
    """A VM with a share does not go on from a snapshot, which has none."""
    config = CONFIG._replace(shares=(OPTION,))
    vm = Vm(config, VmState(1, phase=Phase.STOPPED), ROOT)
    denied = received_vm(replace(REQUEST, source=""), None, ROOT, USERS, (vm,))
    assert denied == Denied(ErrorCode.EINVAL, "the snapshot is of a VM with other shares than web")
