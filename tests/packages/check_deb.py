"""Debian's package and pipx in a fresh Debian system that systemd runs: `make test-deb`.

The system is Debian 13; `DEB_SUITE=bookworm` or `testing` chooses another suite.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.project_files import copy_files
from tests.packages.debian_tree import debian_tree, wheels
from tests.system.vmd.conftest import missing_separation
from tests.system.vmd.daemon import vm_block
from tests.system.vmd.systemd_host import SystemdHost, missing_systemd

pytestmark = [pytest.mark.kvm, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

SUITE = os.environ.get("DEB_SUITE", "trixie")
SELFTEST = Path("/usr/lib/vmm-kvm/vmm_kvm/bios/selftest.bin")
CONFIGURATION = vm_block("one", enabled=True, boot=SELFTEST) + vm_block("two", boot=SELFTEST)
EXPOSURE_MAX = 3.9
_BUILD_S = 600.0
_OFFLINE = ("env", "PIP_NO_INDEX=1", "PIP_FIND_LINKS=/srv/given/wheels")
_PATIENCE_S = 60.0
# Its arguments are our folders: the project's clone, and wheels.
_PREPARE = """
mkdir -p srv/given
mount --bind "$1" srv/given
"""
# As in user@.service, without a login and D-Bus.
_USER_MANAGER = """
[Service]
User=alice
Type=notify
Delegate=yes
KillMode=mixed
Environment=XDG_RUNTIME_DIR=/run/user/{uid}
ExecStart=/lib/systemd/systemd --user
"""
# Files that lasting users, dpkg's and systemd's own accounts, logs and caches change.
_NOT_OURS = re.compile(
    r"/(proc|sys|dev|run|tmp|var/tmp|var/log|var/cache|srv|root)(/|$)"
    r"|/etc/(passwd|group|shadow|gshadow|subuid|subgid)-?$"
    r"|/var/lib/(dpkg|apt|systemd)(/|$)|/usr/lib/systemd/system/vmd-test.target$"
)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemdHost]:
    """Start a fresh system that has a clone of the project and wheels for pip in /srv/given."""
    if reason := missing_separation() or missing_systemd():
        pytest.skip(reason)
    tree = debian_tree(SUITE)
    given = tmp_path_factory.mktemp("given")
    _copy_project(given / "project")
    python = next((tree / "usr/lib").glob("python3.*")).name.removeprefix("python")
    shutil.copytree(wheels(python), given / "wheels")
    given.chmod(0o755)
    with SystemdHost(tree, _PREPARE, given) as system:
        system.run("useradd", "--create-home", "alice")
        system.run("useradd", "--create-home", "mallory")
        yield system


def _copy_project(place: Path) -> None:
    """Copy the files that git tracks, as they are, into a repository of their own."""
    copy_files(place)
    subprocess.run(["git", "init", "-q", place], check=True)
    subprocess.run(["git", "-C", place, "add", "-A"], check=True)


@pytest.fixture(scope="module")
def package(host: SystemdHost) -> str:
    """Build the package there, as a user; returns its path."""
    made = "cp -r /srv/given/project ~/built && cd ~/built && make deb"
    _as(host, "alice", *_OFFLINE, "sh", "-euc", made, timeout_s=_BUILD_S)
    return host.run("sh", "-euc", "ls /home/alice/built/dist/vmm-kvm_*.deb").strip()


def _apt(host: SystemdHost, *words: str) -> str:
    return host.run(
        *("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"),
        *("--no-install-recommends", *words),
        timeout_s=_BUILD_S,
    )


def _files(host: SystemdHost) -> set[str]:
    found = host.run("find", "/", "-xdev", "-not", "-path", "/proc/*")
    return {path for path in found.splitlines() if not _NOT_OURS.match(path)}


def _as(
    host: SystemdHost, user: str, *command: str, check: bool = True, timeout_s: float = 60.0
) -> str:
    """Run a command as a user who has just logged in."""
    home = host.run("getent", "passwd", user).split(":")
    runtime = f"XDG_RUNTIME_DIR=/run/user/{home[2]}"
    path = f"PATH={home[5]}/.local/bin:/usr/bin:/bin"
    user_environment = ("env", "-i", f"HOME={home[5]}", runtime, path, "LC_ALL=C.UTF-8")
    return host.run(
        *("runuser", "-u", user, "--", *user_environment, *command),
        check=check,
        timeout_s=timeout_s,
    )


def _eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def before(host: SystemdHost, package: str) -> set[str]:
    """Return the system's files without the package, once its dependencies are installed."""
    told = host.run("dpkg-deb", "--field", package, "Depends")
    names = [re.split(r"[ (|]", relation)[0] for relation in told.strip().split(", ")]
    _apt(host, "install", *(name for name in names if name.startswith("python3-")))
    return _files(host)


@pytest.fixture(scope="module")
def installed(host: SystemdHost, package: str, before: set[str]) -> SystemdHost:
    """Install the package on a machine that has a vm.conf and a user in the group vmd."""
    assert before
    host.write("/etc/vm.conf", CONFIGURATION)
    _apt(host, "install", package)
    host.run("usermod", "-aG", "vmd", "alice")
    return host


def test_the_daemon_runs(installed: SystemdHost) -> None:
    """Once installed the unit is enabled and the daemon serves; it can be stopped and started."""
    assert installed.run("systemctl", "is-enabled", "vmd").strip() == "enabled"
    _eventually(lambda: installed.states() == {"one": "running", "two": "stopped"})
    installed.run("systemctl", "stop", "vmd")
    assert installed.state("vmd") == "inactive"
    installed.run("systemctl", "start", "vmd")
    _eventually(lambda: installed.states() == {"one": "running", "two": "stopped"})


def test_who_may_speak_with_it(installed: SystemdHost) -> None:
    """A member of the group vmd may connect, and no other user."""
    assert _as(installed, "alice", "vmctl", "status").splitlines()[1].split()[-1] == "one"
    said = _as(installed, "mallory", "vmctl", "status", check=False)
    assert said.splitlines()[0] == "vmctl: connect: /run/vmd.sock: Permission denied"


def test_what_came_along(installed: SystemdHost, package: str) -> None:
    """Pages, completions, examples and versions are installed, and every command runs."""
    for page in (*("vmctl.8", "vmd.8", "vmm-blk.8", "vmm-net.8"), "vm.conf.5"):
        name, _, section = page.rpartition(".")
        assert "vm" in installed.run("man", "--where", section, name)
    assert installed.run("vmd", "-n", "-f", "/dev/null") == "configuration OK\n"
    version = installed.run("dpkg-deb", "--field", package, "Version").strip()
    for name in ("vmctl", "vmd"):
        assert installed.run(name, "--version") == f"{name} {version}\n"
    for name in ("vmm-blk", "vmm-net"):
        assert "usage" in installed.run(name, "--help", check=False).lower()
    listed = installed.run("dpkg", "--listfiles", "vmm-kvm")
    for path in ("bash-completion/completions/vmctl", "doc/vmm-kvm/examples/vm.conf"):
        assert f"/usr/share/{path}\n" in listed


def test_the_units(installed: SystemdHost) -> None:
    """Systemd understands the units, and counts no more exposure than before."""
    for unit in ("vmd.service", "vmd.socket"):
        assert installed.run("systemd-analyze", "verify", "--man=no", unit) == ""
    said = installed.run("systemd-analyze", "security", "--no-pager", "vmd.service")
    found = re.search(r"exposure level for vmd.service: ([\d.]+)", said)
    assert found
    assert float(found[1]) <= EXPOSURE_MAX


def test_an_upgrade_lets_vms_run(installed: SystemdHost, package: str) -> None:
    """An upgrade leaves the daemon running, because VMs end with it."""
    pid = installed.shown("vmd", "MainPID")
    _apt(installed, "install", "--reinstall", package)
    assert installed.shown("vmd", "MainPID") == pid
    assert installed.states()["one"] == "running"


def test_a_purge_leaves_nothing(installed: SystemdHost, before: set[str]) -> None:
    """No process, file or unit is left, except users, as policy says, and files of others."""
    installed.run("systemctl", "enable", "vmd.socket")
    installed.run("touch", "/var/lib/vmd/old.nvram", "/var/lib/vmd/disk.img")
    _apt(installed, "purge", "vmm-kvm")
    assert installed.run("pgrep", "-f", "bin/vmd", check=False) == ""
    assert installed.run("ls", "/run/vmd.sock", check=False).endswith("No such file or directory\n")
    kept = {"/etc/vm.conf", "/var/lib/vmd", "/var/lib/vmd/disk.img"}
    assert _files(installed) - before == kept
    assert before - _files(installed) == set()


@pytest.fixture(scope="module")
def pipx(host: SystemdHost) -> SystemdHost:
    """Let a user in the group kvm install from the tree by pipx."""
    host.run("systemd-sysusers", "/srv/given/project/packaging/vmd.sysusers")
    host.run("sh", "-euc", "chgrp kvm /dev/kvm; chmod 660 /dev/kvm; usermod -aG kvm alice")
    uid = host.run("id", "-u", "alice").strip()
    host.run("install", "-d", "-o", "alice", "-m", "700", f"/run/user/{uid}")
    copied = "cp -r /srv/given/project ~/project && cd ~/project && pipx install ."
    _as(host, "alice", *_OFFLINE, "sh", "-euc", copied, timeout_s=_BUILD_S)
    modules = host.run("sh", "-euc", f"echo {_venv(host)}/lib/python3*/site-packages").strip()
    block = vm_block("mine", enabled=True, boot=Path(modules) / "vmm_kvm/bios/selftest.bin")
    host.write("/home/alice/.config/vm.conf", block)
    host.run("chown", "-R", "alice:", "/home/alice/.config")
    return host


def _venv(host: SystemdHost) -> str:
    """Return pipx's folder of the installation; its releases differ."""
    venvs = _as(host, "alice", "pipx", "environment", "--value", "PIPX_LOCAL_VENVS")
    return f"{venvs.strip()}/vmm-kvm"


def test_a_vm_of_a_user(pipx: SystemdHost) -> None:
    """The self-test guest runs without root and without a daemon."""
    said = _as(pipx, "alice", "timeout", "20", "vmctl", "run", "--selftest", check=False)
    assert "selftest: ready" in said


def test_a_daemon_of_a_user(pipx: SystemdHost) -> None:
    """`vmd --user` needs no root, and serves its user below XDG_RUNTIME_DIR."""
    _as(pipx, "alice", "vmd", "--user")
    _eventually(lambda: _as(pipx, "alice", "vmctl", "status").split()[-2:] == ["running", "mine"])
    _as(pipx, "alice", "vmctl", "stop", "-w", "mine")
    pipx.run("pkill", "-TERM", "-u", "alice", "-f", "bin/vmd")
    _eventually(lambda: pipx.run("pgrep", "-u", "alice", check=False) == "")


def test_units_of_a_user(pipx: SystemdHost) -> None:
    """A user's service manager starts pipx's daemon when a client connects."""
    uid = pipx.run("id", "-u", "alice").strip()
    pipx.write("/run/systemd/system/alice.service", _USER_MANAGER.format(uid=uid))
    pipx.run("systemctl", "daemon-reload")
    pipx.run("systemctl", "start", "alice.service")
    units = f"{_venv(pipx)}/share/systemd/user"
    enable = f"systemctl --user enable --now {units}/vmd.socket {units}/vmd.service"
    _as(pipx, "alice", "sh", "-euc", enable)
    _as(pipx, "alice", "systemctl", "--user", "stop", "vmd.service")
    _eventually(lambda: _as(pipx, "alice", "vmctl", "status").split()[-2:] == ["running", "mine"])
    active = _as(pipx, "alice", "systemctl", "--user", "is-active", "vmd.service")
    assert active == "active\n"
    main = _as(pipx, "alice", "systemctl", "--user", "show", "-P", "MainPID", "vmd.service")
    pipx.run("kill", "-KILL", main.strip())
    _eventually(lambda: _as(pipx, "alice", "vmctl", "status").split()[-2:] == ["running", "mine"])
    pipx.run("systemctl", "stop", "alice.service")
