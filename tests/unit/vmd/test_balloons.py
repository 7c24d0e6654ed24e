"""Memory balloons of the daemon's VMs: who has one."""

from __future__ import annotations

from tests.unit.vmd.registry_host import BOB, Host
from vmd.config.model import Owner, Right, VmConfig
from vmd.rules.vm_state import Exited, Running
from vmd.wire.internal import EndReason
from vmd.wire.messages import ErrorCode, Failed, Start

PLAIN = VmConfig(
    "plain",
    memory=1 << 28,
    boot="/k",
    instance_owner=Owner(BOB),
    given=frozenset({Right.BOOT}),
)


def test_who_has_one() -> None:
    """A configured VM, its instances, and instances that ask; no VM gets one by being started."""
    host = Host()
    host.run(host.registry.load((PLAIN, PLAIN._replace(name="web", has_balloon=True))))
    host.ask(Start(name="mine", instance="web"), BOB)
    assert host.vm("mine").config.has_balloon
    host.ask(Start(name="own", instance="plain", has_balloon=True), BOB)
    assert host.vm("own").config.has_balloon
    host.ask(Start(name="neither", instance="plain"), BOB)
    assert not host.vm("neither").config.has_balloon
    host.ask(Start(name="plain"))
    host.report(host.launch("plain"), Running())
    host.end(host.vm("plain"), Exited(EndReason.POWER_OFF))
    answer = host.ask(Start(name="plain", has_balloon=True))
    assert isinstance(answer, Failed)
    assert answer.code == ErrorCode.EALREADY
    assert not host.vm("plain").config.has_balloon
