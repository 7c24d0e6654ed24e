"""Devices that a VM has only on request."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

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
ASKS = {
    "has_vsock": Start(name="", has_vsock=True),
    "has_balloon": Start(name="", has_balloon=True),
    "has_watchdog": Start(name="", has_watchdog=True),
    "has_tpm": Start(name="", has_tpm=True),
}
HAVE = {
    "has_vsock": PLAIN._replace(name="web", has_vsock=True),
    "has_balloon": PLAIN._replace(name="web", has_balloon=True),
    "has_watchdog": PLAIN._replace(name="web", has_watchdog=True),
    "has_tpm": PLAIN._replace(name="web", has_tpm=True),
}


@pytest.mark.parametrize("field", list(HAVE))
def test_who_has_one(field: str) -> None:
    """A configured VM, its instances, and instances that ask; no VM gets one by being started."""
    host = Host()
    host.run(host.registry.load((PLAIN, HAVE[field])))

    def has(name: str) -> object:
        return getattr(host.vm(name).config, field)

    host.ask(Start(name="mine", instance="web"), BOB)
    host.ask(replace(ASKS[field], name="own", instance="plain"), BOB)
    host.ask(Start(name="neither", instance="plain"), BOB)
    assert [has(name) for name in ("mine", "own", "neither")] == [True, True, False]
    host.ask(Start(name="plain"))
    host.report(host.launch("plain"), Running())
    host.end(host.vm("plain"), Exited(EndReason.POWER_OFF))
    answer = host.ask(replace(ASKS[field], name="plain"))
    assert isinstance(answer, Failed)
    assert answer.code == ErrorCode.EALREADY
    assert not has("plain")
