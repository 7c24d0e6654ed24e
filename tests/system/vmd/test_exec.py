"""`vmctl exec` and `vmctl cp` with a real daemon, and guests without an agent."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.system.vmd.daemon import READY, Daemon, vm_block, vmctl

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]
NO_AGENT = "vmctl: the guest has no agent: nobody listens on its vsock port\n"


def test_guests_without_an_agent(start_vmd: Start) -> None:
    """No driver, no device, not running, no such VM: each is one line; cp prints the same."""
    with start_vmd(vm_block("web", "vsock") + vm_block("plain") + vm_block("off", "vsock")) as vmd:
        for name in ("web", "plain"):
            assert vmctl(vmd, "start", name).returncode == 0
        with vmd.client() as client, client.console("web") as console:
            console.expect(READY)
        for name, told in (
            ("web", NO_AGENT),
            ("plain", "vmctl: the vm has no vsock device\n"),
            ("off", "vmctl: vm is not running\n"),
            ("none", "vmctl: vm not found\n"),
        ):
            done = vmctl(vmd, "exec", name, "--", "true")
            assert (done.returncode, done.stdout, done.stderr) == (255, "", told)
            done = vmctl(vmd, "cp", "/etc/passwd", f"{name}:/tmp/x")
            assert (done.returncode, done.stdout, done.stderr) == (1, "", told)
