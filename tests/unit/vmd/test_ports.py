"""Ports of guests: users whom the parent connects."""

from __future__ import annotations

import pytest

from tests.unit.vmd.registry_host import ALICE, BOB, CAROL, ROOT, STAFF, Host
from vmd.config.model import Owner, Right, VmConfig
from vmd.rules.vm_state import Exited, Paused, Running
from vmd.wire.internal import EndReason
from vmd.wire.messages import ErrorCode, Failed, Pause, Start
from vmd.wire.ports import Connect, Connected

CONFIG = VmConfig(
    "web",
    memory=1 << 28,
    boot="/k",
    owner=Owner(ALICE, STAFF),
    instance_owner=Owner(BOB),
    has_vsock=True,
    given=frozenset({Right.BOOT}),
)


@pytest.fixture
def host() -> Host:
    """A host with a VM that has a vsock device, and one without."""
    one = Host()
    one.run(one.registry.load((CONFIG, CONFIG._replace(name="plain", has_vsock=False))))
    return one


def code(answer: object) -> ErrorCode:
    """Return the error code of a failed request."""
    assert isinstance(answer, Failed), answer
    return answer.code


def test_only_owners_connect(host: Host) -> None:
    """The VM's user, its group, and root may connect; its process gets the port."""
    host.ask(Start(name="web"), ROOT)
    assert code(host.ask(Connect(name="web", port=22), ALICE)) == ErrorCode.NOT_RUNNING
    host.report(host.launch("web"), Running())
    for uid in (ALICE, BOB, ROOT):
        answer = host.ask(Connect(name="web", port=22), uid)
        assert isinstance(answer, Connected)
        assert (answer.id, answer.stream) == (host.vm("web").id, 0)
    assert code(host.ask(Connect(name="web", port=22), CAROL)) == ErrorCode.EPERM
    assert host.told[host.vm("web").id] == ["ConnectVm"] * 3


def test_which_vms_have_ports(host: Host) -> None:
    """A VM without the device is refused first; a paused one is fine."""
    assert code(host.ask(Connect(name="plain", port=1))) == ErrorCode.EINVAL
    assert code(host.ask(Connect(name="web", port=1))) == ErrorCode.NOT_RUNNING
    assert code(host.ask(Connect(name="none", port=1))) == ErrorCode.ENOENT
    host.ask(Start(name="web"))
    host.report(host.launch("web"), Running())
    host.begin(Pause(name="web"))
    host.report(host.vm("web"), Paused())
    assert isinstance(host.ask(Connect(name="web", port=1)), Connected)


def test_instances_have_the_device_of_their_template(host: Host) -> None:
    """A request for an existing VM does not add the device."""
    host.ask(Start(name="mine", instance="web"), BOB)
    assert host.vm("mine").config.has_vsock
    host.ask(Start(name="own", instance="plain", has_vsock=True), BOB)
    assert host.vm("own").config.has_vsock
    assert code(host.ask(Start(name="plain", has_vsock=True))) == ErrorCode.EALREADY
    host.report(host.launch("plain"), Running())
    host.end(host.vm("plain"), Exited(EndReason.POWER_OFF))
    assert code(host.ask(Start(name="plain", has_vsock=True))) == ErrorCode.EALREADY
    assert not host.vm("plain").config.has_vsock
