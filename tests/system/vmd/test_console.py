"""`vmctl console` and a real daemon: output over reboots is shown once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.system.vmd.daemon import READY, Daemon, Stream, vm_block
from tests.vmctl_driver import VMCTL, ConsoleProcess

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]
WAIT_S = 30.0


def test_a_console_that_stays_attached_shows_nothing_twice(start_vmd: Start) -> None:
    """At a reboot the daemon repeats earlier output, and vmctl does not show it again."""
    with start_vmd(vm_block("one") + vm_block("two")) as vmd, vmd.client() as client:
        for name in ("one", "two"):
            assert client.ask("start", name=name)["type"] == "started"
            words = [str(VMCTL), "console", name]
            environment = {"VMD_SOCKET": str(vmd.socket)}
            with (
                client.console(name) as first,
                ConsoleProcess(words, environment=environment) as console,
            ):
                first.expect(READY)
                console.expect("selftest: ready", WAIT_S)
                for _ in range(2):
                    console.send("r")
                    console.expect("selftest: ready", WAIT_S)
                assert client.ask("stop", name=name, force=True, wait=True)["type"] == "terminated"
                assert console.wait(WAIT_S) == 0
                assert console.output.count(READY) == 3
                assert console.output.count(b"self-test guest") == 3


def test_the_daemon_says_where_history_ends(start_vmd: Start) -> None:
    """A console that attaches late learns how much of its output is old."""
    with start_vmd(vm_block("one")) as vmd, vmd.client() as client:
        assert client.ask("start", name="one")["type"] == "started"
        with client.console("one") as console:
            console.expect(READY)
        client.send("console", name="one")
        answer, fds = client.receive()
        with Stream(fds[0]) as late:
            late.expect(READY)
            assert answer["position"] == 0
            assert answer["history"] in range(
                late.output.index(READY) + len(READY), len(late.output) + 9
            )
