"""vmd's units under a systemd that runs: as installed, hardened, watched, activated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.system.vmd.conftest import missing_separation
from tests.system.vmd.systemd_host import SystemdHost, block, missing_systemd

pytestmark = [pytest.mark.kvm, pytest.mark.root, pytest.mark.slow]

_PATIENCE_S = 30.0
SERVICE, SOCKET = "vmd.service", "vmd.socket"


@pytest.fixture(scope="module")
def systemd() -> Iterator[SystemdHost]:
    """Start a systemd."""
    if reason := missing_separation() or missing_systemd():
        pytest.skip(reason)
    with SystemdHost() as host:
        yield host


@pytest.fixture
def host(systemd: SystemdHost) -> Iterator[SystemdHost]:
    """Return it with nothing of vmd's running."""
    systemd.write("/etc/vm.conf", systemd.configuration)
    yield systemd
    systemd.run("systemctl", "stop", SOCKET, SERVICE)
    systemd.run("systemctl", "reset-failed")


def _eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _main_pid(host: SystemdHost) -> str:
    return host.shown(SERVICE, "MainPID")


def test_users_and_devices(host: SystemdHost) -> None:
    """The daemon's user is made by sysusers, and /dev/kvm given to its group by tmpfiles."""
    assert "_vmd:" in host.run("getent", "passwd", "_vmd")
    assert host.run("stat", "-c", "%a %U:%G", "/dev/kvm") == "660 root:kvm\n"


def test_the_units_are_right(host: SystemdHost) -> None:
    """Every line of them is understood."""
    paths = [f"/lib/systemd/system/{unit}" for unit in (SERVICE, SOCKET)]
    said = host.run("systemd-analyze", "verify", "--man=no", *paths)
    assert said == ""


def test_from_start_to_stop(host: SystemdHost) -> None:
    """A start is over when VMs can be asked for, a reload reads vm.conf; a stop asks guests to."""
    host.run("systemctl", "start", SERVICE)
    assert host.states() == {"one": "running", "two": "stopped"}
    host.run("vmctl", "start", "two")
    host.write("/etc/vm.conf", host.configuration + block("three", enabled=True))
    host.run("systemctl", "reload", SERVICE)
    _eventually(lambda: host.states() == dict.fromkeys(("one", "two", "three"), "running"))
    _eventually(lambda: host.run("vmctl", "status").count(" - ") == 0)  # each has a process
    host.run("systemctl", "stop", SERVICE)
    assert (host.state(SERVICE), host.shown(SERVICE, "Result")) == ("inactive", "success")
    log = host.run("journalctl", "--unit", SERVICE, "--output=cat")
    assert all(f"stopping vm {name}: terminated vm" in log for name in ("one", "two", "three"))
    assert "bin/vmd" not in host.run("ps", "-e", "-o", "args")


def test_the_socket_starts_the_daemon(host: SystemdHost) -> None:
    """A client that comes first is answered, by a daemon that starts for it."""
    host.run("systemctl", "start", SOCKET)
    assert host.state(SERVICE) == "inactive"
    assert host.states().keys() == {"one", "two"}
    assert host.state(SERVICE) == "active"


@pytest.mark.parametrize("signal", ["STOP", "KILL"])
def test_a_daemon_that_fails_is_started_again(host: SystemdHost, signal: str) -> None:
    """One that hangs is killed by the watchdog; its VMs run again, under another daemon."""
    host.write("/run/systemd/system/vmd.service.d/watchdog.conf", "[Service]\nWatchdogSec=2\n")
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "start", SERVICE)
    before = _main_pid(host)
    time.sleep(3)  # longer than the watchdog waits
    assert _main_pid(host) == before
    host.run("kill", f"-{signal}", before)
    _eventually(lambda: _main_pid(host) not in {before, "0"})
    _eventually(lambda: host.state(SERVICE) == "active")
    _eventually(lambda: host.states()["one"] == "running")
