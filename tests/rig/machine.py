"""The rig: a full KVM host on any machine, by emulation.

Many machines (CI runners, cloud guests) have no usable hardware virtualisation, or a /dev/kvm
that emulates guest kernels one instruction at a time. The rig boots a distribution kernel under
QEMU's software emulation of an AMD processor with SVM. Inside it kvm_amd (less one function:
kvm_amd.py), vhost, tun, bridge, nftables and the rest of the kernel are the real ones, so that the
tested code runs an unmodified Linux guest.

QEMU has to be 10.0 or newer: 7.2 loses interrupts under nested SVM and hangs.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import artifacts

_QMP = "qmp"
_GUARD = "no_pv_eoi.so"
_KEY = b'{"execute": "send-key", "arguments": {"keys": [{"type": "qcode", "data": "shift"}]}}\n'
_KEY_INTERVAL_S = 1.0

# On a busy machine the kernel can take delays of emulation for a wrong TSC; it then reads the HPET
# instead, and moves the TSC of guests (`tsc=reliable`). Nor does its timer always tick in time: it
# gives up and panics (`no_timer_check`).
_COMMAND_LINE = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check"

THREADS = Path("/run/threads")
"""In the rig: this machine's /proc/PID/task of the rig's QEMU."""


def processor_ns() -> int:
    """Return the run time of the rig's processor; outside the rig the clock; nanoseconds.

    On a busy machine the rig is slower, but does as much in a second of its processor.
    """
    for thread in THREADS.glob("*/comm"):
        if thread.read_text().startswith("CPU "):
            return int(thread.with_name("schedstat").read_text().split()[0])
    return time.monotonic_ns()


EXIT_TIMEOUT = 124
EXIT_NOT_UP = 125

# The first process after the switch to the shared root. It unpacks stages in the given order,
# so that one may lie inside another. At the end it powers off without stopping other processes.
_MAIN = """#!/bin/bash
exec >/dev/console 2>&1 </dev/null
. /run/rig/env
export RIG={clock} RIG_OUT=/run/rig/out
export PATH="$PATH:/usr/sbin:/sbin"
cp /run/rig/{guard} /dev/shm && export LD_PRELOAD=/dev/shm/{guard}
ip link set lo up
# The host's KVM tells of every odd register that a guest touches; the command's output is wanted.
echo 3 > /proc/sys/kernel/printk
for stage in $(ls -d /run/rig/stage-* 2>/dev/null | sort -V); do
    place=$(cat "$stage/place")
    if [ -e "$stage/tar" ]; then
        mkdir -p "$place"
        mount -t tmpfs -o size=90% tmpfs "$place" && tar -x -f "$stage/tar" -C "$place"
    else
        copy=/dev/shm/${{stage##*/}}
        cp -p "$stage/file" "$copy" && mount --bind "$copy" "$place"
    fi
done
cd {directory}
echo "rig: up"
setsid -w {command}
echo $? > /run/rig/status
sync
echo 0 > /proc/sys/kernel/printk
busybox poweroff -f
"""

# Files that a run of the project's own tests never reads.
_REPOSITORY_LEAVES = (".git", ".venv", ".cache", ".*_cache", "build", "dist", "out")
_VENV_LEAVES = ("bin/ruff", "bin/uv*", "mypy", "mypyc", "pip", "setuptools", "share", "include")
_STDLIB_LEAVES = (
    *("test", "tests", "idlelib", "turtledemo", "ensurepip", "lib2to3", "tkinter"),
    *("site-packages", "dist-packages", "config-*", "*.opt-?.pyc"),
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A path whose content is copied into the rig's memory before the command starts.

    A copy of a directory, without the files that the `tar --exclude` patterns match, covers the
    directory; a copy of a file covers the file.
    """

    path: Path
    exclude: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Stage:
        """Read `PATH[:PATTERN,...]`."""
        path, _, patterns = text.partition(":")
        return cls(Path(path), tuple(part for part in patterns.split(",") if part))

    def save(self, place: Path) -> None:
        """Write the files for the rig to unpack into the directory `place`, and make it."""
        place.mkdir()
        source = self.path.resolve()
        (place / "place").write_text(str(source))
        if source.is_dir():
            excludes = [f"--exclude={pattern}" for pattern in self.exclude]
            subprocess.run(
                ["tar", "-c", "-f", place / "tar", *excludes, "-C", source, "."], check=True
            )
        else:
            shutil.copy(source, place / "file")


@dataclass(frozen=True, slots=True)
class Rig:
    """A command, and the machine to run it in.

    `memory` is in bytes; `timeout_s` counts from the start of the rig; `is_counted` gives it one
    processor whose clock counts instructions; `copies_words` gives it processors without ERMS and
    FSRM, so that kernels copy by eight bytes a step instead of by `rep movsb`, of which QEMU
    emulates each byte; `out`, if set, receives the files that the command left in
    the directory `$RIG_OUT`, also after a time-out; `patience_s`, if set, limits the time for which
    the rig may print nothing.
    """

    command: tuple[str, ...]
    cpus: int = 2
    memory: int = 6 << 30
    timeout_s: float = 900
    is_counted: bool = False
    copies_words: bool = False
    stages: tuple[Stage, ...] = ()
    out: Path | None = None
    patience_s: float | None = None

    def run(self) -> int:
        """Boot, run the command with its output on our stdout, and power off.

        Returns:
            the command's exit status, 124 after a time-out, 125 if the rig did not come up.

        Raises:
            tests.artifacts.ArtifactError: there is no kernel, or the initramfs cannot be built.
        """
        kernel = artifacts.kernel("generic")
        image = artifacts.rig_initramfs(kernel)
        with tempfile.TemporaryDirectory(prefix="rig-") as scratch:
            share = Path(scratch)
            (share / "out").mkdir()
            for number, stage in enumerate(self.stages):
                stage.save(share / f"stage-{number}")
            (share / "env").write_text(environment_script(os.environ))
            build_guard(share / _GUARD)
            main = share / "main"
            main.write_text(main_script(Path.cwd(), self.command, is_counted=self.is_counted))
            main.chmod(0o755)
            process = subprocess.Popen(
                qemu_arguments(self, kernel.vmlinuz, image, share),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self.patience_s else None,
            )
            try:
                is_over = wait(
                    process,
                    self.timeout_s,
                    self.patience_s or self.timeout_s,
                    None if self.is_counted else share / _QMP,
                )
            finally:
                process.kill()
                process.wait()
                if process.stdout:
                    process.stdout.close()
                if self.out is not None:
                    shutil.copytree(share / "out", self.out, dirs_exist_ok=True)
            if not is_over:
                return EXIT_TIMEOUT
            status = share / "status"
            return int(status.read_text()) if status.exists() else EXIT_NOT_UP


def wait(
    process: subprocess.Popen[bytes], timeout_s: float, patience_s: float, qmp: Path | None
) -> bool:
    """Wait for QEMU's end; False if it still runs after that time, or is silent for too long.

    Passes on QEMU's output, if it comes by a pipe.

    QEMU's SVM can lose the interrupt of the rig's timer while a nested guest waits for one: the
    entry into the guest sets a bit in a word without the lock that the timer holds when it sets
    another (10.0, target/i386/tcg/system/svm_helper.c, helper_vmrun:
    `cs->interrupt_request |= CPU_INTERRUPT_VIRQ`). The timer is not armed again before its
    interrupt is served, so the rig would hang for ever.
    Any other interrupt makes QEMU look again: a key, pressed through `qmp` once a second.
    """
    deadline = time.monotonic() + timeout_s
    silent_until = time.monotonic() + patience_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        is_connected = False
        while (remaining := min(deadline, silent_until) - time.monotonic()) > 0:
            if process.stdout and _pass_on(
                process.stdout.fileno(), min(remaining, _KEY_INTERVAL_S)
            ):
                silent_until = time.monotonic() + patience_s
                continue
            try:
                process.wait(0 if process.stdout else min(remaining, _KEY_INTERVAL_S))
            except subprocess.TimeoutExpired:
                if qmp is None:
                    continue
                if not is_connected and qmp.exists():
                    control.connect(str(qmp))
                    control.setblocking(False)
                    control.send(b'{"execute": "qmp_capabilities"}\n')
                    is_connected = True
                elif is_connected:
                    _press_key(control)
            else:
                return True
    return False


def _pass_on(fd: int, timeout_s: float) -> bool:
    """Print available output of a pipe; False if there is none in that time, or at its end."""
    if not select.select([fd], [], [], timeout_s)[0]:
        return False
    data = os.read(fd, 65536)
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
    return bool(data)


def _press_key(control: socket.socket) -> None:
    # Read and drop the answers; QEMU's exit shows its end.
    with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
        control.recv(65536)
    with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
        control.send(_KEY)


def build_guard(target: Path) -> None:
    """Build the library that keeps guests from getting an interrupt twice; its source says how."""
    source = Path(__file__).with_name("no_pv_eoi.c")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", target, source], check=True)


def main_script(directory: Path, command: Sequence[str], *, is_counted: bool = False) -> str:
    """Return the script that runs the command in the rig, in this working directory."""
    return _MAIN.format(
        directory=shlex.quote(str(directory)),
        command=shlex.join(command),
        clock="counted" if is_counted else "plain",
        guard=_GUARD,
    )


def environment_script(environment: Mapping[str, str]) -> str:
    """Return shell lines that set the environment, without names that no shell accepts."""
    skipped = {"_", "SHLVL", "PWD", "OLDPWD"}
    return "".join(
        f"export {name}={shlex.quote(value)}\n"
        for name, value in environment.items()
        if name not in skipped and name.isidentifier()
    )


def qemu_arguments(rig: Rig, vmlinuz: Path, image: Path, share: Path) -> list[str]:
    """Return QEMU's command line.

    `sleep=off` makes the counted clock skip idle time instead of waiting for it.
    """
    if rig.is_counted:
        clock = ["-accel", "tcg,thread=single", "-smp", "1", "-icount", "shift=1,sleep=off"]
    else:
        clock = ["-accel", "tcg,thread=multi", "-smp", str(rig.cpus)]
    return [
        *("qemu-system-x86_64", "-M", "q35", "-name", "rig,debug-threads=on"),
        *("-cpu", "max,erms=off,fsrm=off" if rig.copies_words else "max"),
        *clock,
        *("-m", f"{rig.memory >> 20}M"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-kernel", str(vmlinuz), "-initrd", str(image)),
        *("-append", _COMMAND_LINE),
        "-virtfs",
        "local,path=/,security_model=none,mount_tag=root,readonly=on,multidevs=remap",
        "-virtfs",
        f"local,path={share},security_model=none,mount_tag=out",
        "-virtfs",
        "local,path=/proc/self/task,security_model=none,mount_tag=threads,readonly=on",
        *("-device", "virtio-rng-pci", "-qmp", f"unix:{share / _QMP},server=on,wait=off"),
    ]


def tree_stages(root: Path) -> tuple[Stage, ...]:
    """Return the stages of a tree of this project and of its virtual environment."""
    return Stage(root, _REPOSITORY_LEAVES), Stage(root / ".venv", _VENV_LEAVES)


def project_stages(root: Path) -> tuple[Stage, ...]:
    """Return the stages that keep a run of this project's Python code off 9p.

    The repository, its virtual environment, and the interpreter with its standard library: a
    failed look-up of an import over 9p costs more than reading the module.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    interpreter = Path(sys.executable).resolve()
    return (
        *tree_stages(root),
        Stage(stdlib, _STDLIB_LEAVES),
        Stage(interpreter),
    )
