"""vmd's units under a running systemd: as installed, hardened, watched, activated."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest

from tests.system.vmd.conftest import missing_separation
from tests.system.vmd.systemd_host import TreeHost, block, missing_systemd

pytestmark = [pytest.mark.kvm, pytest.mark.root, pytest.mark.slow]

_PATIENCE_S = 30.0
SERVICE, SOCKET = "vmd.service", "vmd.socket"
EXPOSURE_MAX = 3.9


@pytest.fixture(scope="module")
def systemd() -> Iterator[TreeHost]:
    """Start a systemd."""
    if reason := missing_separation() or missing_systemd():
        pytest.skip(reason)
    with TreeHost() as host:
        yield host


@pytest.fixture
def host(systemd: TreeHost) -> Iterator[TreeHost]:
    """Return it once nothing of vmd's runs."""
    systemd.write("/etc/vm.conf", systemd.configuration)
    yield systemd
    systemd.run("systemctl", "stop", SOCKET, SERVICE)
    systemd.run("systemctl", "reset-failed")


def _eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _main_pid(host: TreeHost) -> str:
    return host.shown(SERVICE, "MainPID")


def test_users_and_devices(host: TreeHost) -> None:
    """The daemon's user is made by sysusers, and tmpfiles gives /dev/kvm to its group."""
    assert "_vmd:" in host.run("getent", "passwd", "_vmd")
    assert host.run("stat", "-c", "%a %U:%G", "/dev/kvm") == "660 root:kvm\n"


def _socket_rights(host: TreeHost) -> str:
    return host.run("stat", "-c", "%a %U:%G", "/run/vmd.sock").strip()


def _may_connect(host: TreeHost, user: str) -> bool:
    as_user = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
    return host.run(*as_user, "sh", "-c", "test -w /run/vmd.sock && echo yes", check=False) != ""


@pytest.mark.parametrize("unit", [SERVICE, SOCKET])
def test_who_may_connect(host: TreeHost, unit: str) -> None:
    """Root and the group vmd, or the owner in vm.conf, may connect, with and without vmd.socket."""
    host.run("systemctl", "start", unit)
    host.states()
    assert (_socket_rights(host), _may_connect(host, "daemon")) == ("660 root:vmd", False)
    host.write("/etc/vm.conf", f"socket owner daemon:tty\n{host.configuration}")
    host.run("systemctl", "reload", SERVICE)
    _eventually(lambda: _may_connect(host, "daemon"))
    assert _socket_rights(host) == "660 root:tty"
    host.write("/etc/vm.conf", host.configuration)
    host.run("systemctl", "reload", SERVICE)
    _eventually(lambda: _socket_rights(host) == "660 root:vmd")
    assert not _may_connect(host, "daemon")


def test_a_user_that_is_missing(host: TreeHost) -> None:
    """Without the user _vmd the daemon does not start, and prints the command that makes it."""
    host.run("sed", "-i", "/^_vmd:/d", "/etc/passwd", "/etc/shadow", "/etc/group", "/etc/gshadow")
    said = host.run("vmd", "-d", check=False)
    found = re.fullmatch(r"vmd: unknown user _vmd \(make it: (.*)\)\n", said)
    assert found, said
    host.run("sh", "-euc", found[1])
    host.run("systemctl", "start", SERVICE)


def test_the_units_are_right(host: TreeHost) -> None:
    """The units have no line that systemd does not understand."""
    paths = [f"/lib/systemd/system/{unit}" for unit in (SERVICE, SOCKET)]
    said = host.run("systemd-analyze", "verify", "--man=no", *paths)
    assert said == ""


def test_from_start_to_stop(host: TreeHost) -> None:
    """A start is over when the daemon serves, a reload reads vm.conf; a stop asks guests."""
    host.run("systemctl", "start", SERVICE)
    _eventually(lambda: host.states() == {"one": "running", "two": "stopped"})
    host.run("vmctl", "start", "two")
    groups = host.run("ls", f"/sys/fs/cgroup/system.slice/{SERVICE}").split()
    assert {"vmd", "vm-1", "vm-2"} <= set(groups)  # they are counted
    host.write("/etc/vm.conf", host.configuration + block("three", enabled=True))
    host.run("systemctl", "reload", SERVICE)
    _eventually(lambda: host.states() == dict.fromkeys(("one", "two", "three"), "running"))
    _eventually(lambda: host.run("vmctl", "status").count(" - ") == 0)  # each has a process
    host.run("systemctl", "stop", SERVICE)
    assert (host.state(SERVICE), host.shown(SERVICE, "Result")) == ("inactive", "success")
    log = host.run("journalctl", "--unit", SERVICE, "--output=cat")
    assert all(f"stopping vm {name}: terminated vm" in log for name in ("one", "two", "three"))
    found = host.run("journalctl", "VM=two", "REQUEST=start", "UID=0", "--output=cat")
    assert found == "vmd: two: started by root\n"
    assert "started two (vm 2)" in host.run("journalctl", "VM=two", "--output=cat")
    assert "bin/vmd" not in host.run("ps", "-e", "-o", "args")


def test_the_unit_leaves_what_networks_need(host: TreeHost) -> None:
    """The hardened unit still makes interfaces, bridges, NAT and settings below /proc/sys/net."""
    host.write(
        "/etc/vm.conf",
        'local prefix 100.64.0.0/10 nat\nswitch "lab" {\n\tcreate\n\tlocked lladdr\n}\n'
        + block("one", 'interface { switch "lab" }', "local interface", enabled=True),
    )
    host.run("sysctl", "-qw", "net.ipv4.ip_forward=0")
    host.run("systemctl", "start", SERVICE)
    _eventually(lambda: host.run("vmctl", "status").count(" - ") == 0)  # it has a process
    links = host.run("ip", "-brief", "link")
    assert [name in links for name in ("lab", "tap0", "tap1")] == [True] * 3
    assert host.run("nft", "list", "tables") == "table inet vmd\ntable netdev vmd\n"
    assert host.run("sysctl", "-n", "net.ipv4.ip_forward") == "1\n"
    log = host.run("journalctl", "--unit", SERVICE, "--output=cat", "--priority=warning")
    assert log == ""


def test_the_unit_leaves_what_disks_need(host: TreeHost) -> None:
    """The hardened unit writes to disks in closed homes; a console belongs to its VM's owner."""
    places = ("/home/someone", "/root/images", "/srv", "/var/lib/images")
    disks = []
    for number, place in enumerate(places):
        disks.append(f"{place}/disk.img")
        host.run("sh", "-euc", f"mkdir -p {place}; truncate -s 1M {disks[-1]}")
        host.run("chmod", ("700", "755")[number % 2], place)
    host.run("chown", "-R", "daemon:daemon", places[0])
    lines = [f'disk "{disk}"' for disk in disks]
    host.write("/etc/vm.conf", block("one", *lines, "owner daemon:daemon", enabled=True))
    host.run("systemctl", "start", SERVICE)
    _eventually(lambda: host.states() == {"one": "running"})
    (tty,) = re.findall(r"/dev/pts/\d+", host.run("vmctl", "status", "--json"))
    assert host.run("stat", "-c", "%a %U:%G", tty) == "660 daemon:daemon\n"


def test_the_exposure_of_the_unit(host: TreeHost) -> None:
    """The figure of systemd for the unit's exposure does not grow."""
    said = host.run("systemd-analyze", "security", "--no-pager", SERVICE)
    found = re.search(r"exposure level for vmd.service: ([\d.]+)", said)
    assert found
    assert float(found[1]) <= EXPOSURE_MAX


def test_the_socket_starts_the_daemon(host: TreeHost) -> None:
    """The daemon starts for the first client, and answers it."""
    host.run("systemctl", "start", SOCKET)
    assert host.state(SERVICE) == "inactive"
    assert host.states().keys() == {"one", "two"}
    assert host.state(SERVICE) == "active"


@pytest.mark.parametrize("signal", ["STOP", "KILL"])
def test_a_daemon_that_fails_is_started_again(host: TreeHost, signal: str) -> None:
    """The watchdog kills a hanging daemon; its VMs run again, under another daemon."""
    host.write("/run/systemd/system/vmd.service.d/watchdog.conf", "[Service]\nWatchdogSec=2\n")
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "start", SERVICE)
    before = _main_pid(host)
    time.sleep(3)  # longer than the watchdog's time
    assert _main_pid(host) == before
    host.run("kill", f"-{signal}", before)
    _eventually(lambda: _main_pid(host) not in {before, "0"})
    _eventually(lambda: host.state(SERVICE) == "active")
    _eventually(lambda: host.states()["one"] == "running")
