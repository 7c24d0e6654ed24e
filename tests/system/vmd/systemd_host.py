"""systemd as the init process of a host of a test's own: namespaces, and a system's files.

It sees this machine's root file system, or that of another directory, below a scratch layer, has
devices, a process table, a network and a cgroup of its own, and starts only the units of a test's
target. The rest of the machine is never touched.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

from tests.system.vmd.daemon import ROOT, SELFTEST, vm_block

INIT = Path("/lib/systemd/systemd")
_TIMEOUT_S = 60.0
_TARGET = "vmd-test.target"
_PATH = "/usr/bin:/bin:/usr/sbin:/sbin"
_PLACE = Path("/usr/lib/vmd-test")
"""The project's place there."""
_SELFTEST = _PLACE / SELFTEST.relative_to(ROOT)
# The units of an early boot that are needed here; the others are for machines.
_EARLY = ("systemd-sysusers", "systemd-tmpfiles-setup", "systemd-tmpfiles-setup-dev")
_SETUP = r"""
scratch=$1
mount --make-rprivate /
mount -t tmpfs tmpfs "$scratch"
mkdir "$scratch/upper" "$scratch/work" "$scratch/root"
mount -t overlay overlay "$scratch/root" \
    -o "lowerdir=$lower,upperdir=$scratch/upper,workdir=$scratch/work"
cd "$scratch/root"

: > etc/fstab
rm -rf etc/systemd/system usr/lib/systemd/system/*.target.wants
units=usr/lib/systemd/system
mkdir -p etc/systemd/system $units/sysinit.target.wants $units/sockets.target.wants
for unit in $early; do
    ln -s ../$unit.service $units/sysinit.target.wants/
done
ln -s ../systemd-journald.socket $units/sockets.target.wants/
printf '[Unit]\nRequires=basic.target\nAfter=basic.target\n' > $units/$target
sh -euc "$prepare" prepare "$folder"

# Devices have inodes of their own: this host gives them to whom it likes.
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/net dev/pts dev/shm
while read -r name major minor; do mknod -m 666 dev/$name c $major $minor; done <<end
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
net/tun 10 200
kvm 10 $(grep -w kvm /proc/misc | cut -d ' ' -f 1)
end
chmod 600 dev/kvm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd

mount -t proc proc proc
mount --bind proc/sys/net "$scratch/work"
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount --move "$scratch/work" proc/sys/net
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mkdir run/old
pivot_root . run/old
umount -l run/old
exec env -i container=vmd-test PATH="$path" \
    /lib/systemd/systemd --unit=$target --log-target=null --show-status=0
"""
# Run in the new root directory: install the units, and commands that run the modules of the tree.
_PREPARE = r"""
project=$1 place=%s
sed -i '/^_vmd:/d; /^vmd:/d; /^kvm:/d' etc/passwd etc/group etc/shadow etc/gshadow
for name in vmd vmctl; do
    rm -f usr/bin/$name
    printf '#!/bin/sh\nPYTHONPATH=%%s exec %%s/.venv/bin/python -m %%s "$@"\n' \
        $place $place $name > usr/bin/$name
    chmod 755 usr/bin/$name
done
# Where it is now may be on another mount, or in /tmp, which an early boot empties.
mkdir -p .$place
mount --bind "$project" .$place
mount -o remount,bind,ro .$place
units=usr/lib/systemd/system
cp "$project"/packaging/vmd.service "$project"/packaging/vmd.socket $units/
cp "$project"/packaging/vmd.sysusers usr/lib/sysusers.d/vmd.conf
cp "$project"/packaging/vmd.tmpfiles usr/lib/tmpfiles.d/vmd.conf
"""


def missing_systemd() -> str | None:
    """Return why such a host is impossible here."""
    if not INIT.exists():
        return "systemd is not installed"
    if _cgroups() is None:
        return "no cgroup2 is mounted"
    return None


def _cgroups() -> Path | None:
    """Return the mount point of the unified cgroup hierarchy."""
    found = re.search(r"^\S+ (\S+) cgroup2 ", Path("/proc/mounts").read_text(), re.MULTILINE)
    return Path(found[1]) if found else None


def block(name: str, *lines: str, enabled: bool = False) -> str:
    """Return a vm.conf block of a VM that boots the self-test guest there."""
    return vm_block(name, *lines, enabled=enabled, boot=_SELFTEST)


class SystemdHost:
    """A running systemd; a context manager that ends it and all that it runs."""

    def __init__(self, lower: Path, prepare: str, folder: Path) -> None:
        """Start it, and wait until its early boot is over.

        Its root directory is `lower` below a scratch layer. `prepare` is a shell script that runs
        there before systemd does; its argument is `folder`.
        """
        cgroups = _cgroups()
        assert cgroups is not None
        self._cgroup = Path(tempfile.mkdtemp(prefix="vmd-test-", dir=cgroups))
        self._cgroup.chmod(0o755)  # users have cgroups of their own in it
        self._scratch = Path(tempfile.mkdtemp(prefix="vmd-test-"))
        join = f"echo $$ > {self._cgroup}/cgroup.procs; "
        unshare = (
            *("unshare", "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--net"),
            *("--fork", "--kill-child", "sh", "-euc", _SETUP, "setup"),
        )
        self._process = subprocess.Popen(
            ["sh", "-euc", join + 'exec "$@"', "join", *unshare, str(self._scratch)],
            env={
                **os.environ,
                "early": " ".join(_EARLY),
                "folder": str(folder),
                "lower": str(lower),
                "path": _PATH,
                "prepare": prepare,
                "target": _TARGET,
            },
        )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while self.state(_TARGET) != "active":
            assert self._process.poll() is None, "systemd has ended"
            assert time.monotonic() < deadline, "systemd does not come up"
            time.sleep(0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pid = self._init()
        if pid:
            os.kill(pid, 9)  # ends all processes of its pid namespace
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._scratch)
        deadline = time.monotonic() + _TIMEOUT_S
        while "populated 1" in (self._cgroup / "cgroup.events").read_text():
            assert time.monotonic() < deadline, "what systemd has started does not end"
            time.sleep(0.05)
        for folder, _, _ in os.walk(self._cgroup, topdown=False):
            Path(folder).rmdir()

    def _init(self) -> int:
        """Return the process id of systemd outside; 0 if there is none."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        words = children.read_text().split() if children.exists() else []
        return int(words[0]) if words else 0

    def run(self, *command: str, check: bool = True, timeout_s: float = _TIMEOUT_S) -> str:
        """Run a command there; returns all its output.

        Raises:
            AssertionError: it failed, and `check` is true.
        """
        namespaces = ("--mount", "--pid", "--ipc", "--uts", "--net", "--cgroup", "--root", "--wd")
        done = subprocess.run(
            ["nsenter", f"--target={self._init()}", *namespaces, *command],
            env={"PATH": _PATH, "HOME": "/root", "LC_ALL": "C.UTF-8"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def write(self, path: str, text: str) -> None:
        """Write a file there."""
        self.run("sh", "-euc", 'mkdir -p "$(dirname "$1")"; printf %s "$2" > "$1"', "-", path, text)

    def state(self, unit: str) -> str:
        """Return systemd's word for the state of a unit."""
        return self.run("systemctl", "is-active", unit, check=False).strip()

    def shown(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--property", name, "--value", unit).strip()

    def states(self) -> dict[str, str]:
        """Return each VM's state in the words of `vmctl status`."""
        rows = [line.split() for line in self.run("vmctl", "status").splitlines()[1:]]
        return {row[-1]: row[-2] for row in rows}


class TreeHost(SystemdHost):
    """A host with this machine's files, with the tree's units and users installed.

    vmd does not run yet, and vm.conf has a VM that starts with vmd, `one`, and one that does not,
    `two`.
    """

    def __init__(self) -> None:
        """Start it."""
        self.configuration = block("one", enabled=True) + block("two")
        configure = f"printf %s {shlex.quote(self.configuration)} > etc/vm.conf\n"
        super().__init__(Path("/"), _PREPARE % _PLACE + configure, ROOT)
