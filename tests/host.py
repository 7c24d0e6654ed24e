"""Probes of this machine: a KVM at all, a KVM that runs a distribution kernel, root.

Each returns None, or one line that says what is missing and what to do.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

from tests import artifacts

_KVM_GET_API_VERSION = 0xAE00  # KVM API §4.1
_KVM_API_VERSION = 12
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PROBE_TIMEOUT_S = 15


def missing_root() -> str | None:
    """Return why tests that need root cannot run."""
    return None if os.geteuid() == 0 else "this test needs root"


def missing_kvm() -> str | None:
    """Return why tests that need /dev/kvm cannot run."""
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    try:
        version = fcntl.ioctl(device, _KVM_GET_API_VERSION)
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    finally:
        os.close(device)
    return None if version == _KVM_API_VERSION else f"/dev/kvm: API version {version}, not 12"


def missing_guest_kvm() -> str | None:
    """Return why guests with a distribution kernel cannot run on this machine's KVM.

    The first call after the machine's start boots one under QEMU, for at most 15 seconds; later
    calls read the noted result. The rig needs no probe.
    """
    if os.environ.get("RIG"):
        return None
    reason = missing_kvm()
    if reason is not None:
        return reason
    memory = artifacts.cache_dir() / f"host-kvm-{_BOOT_ID.read_text().strip()}"
    if not memory.exists():
        memory.write_text("yes" if _linux_boots() else "no")
    if memory.read_text() == "yes":
        return None
    return "this machine's KVM runs no distribution kernel; use make test-guest, which has the rig"


def _linux_boots() -> bool:
    kernel = artifacts.kernel("cloud")
    arguments = [
        *("qemu-system-x86_64", "-M", "microvm", "-accel", "kvm", "-cpu", "host", "-m", "256M"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-kernel", str(kernel.vmlinuz), "-initrd", str(artifacts.plain_initramfs())),
        *("-append", "console=ttyS0 quiet reboot=t panic=-1 test=reboot"),
    ]
    try:
        shown = subprocess.run(
            arguments,
            check=False,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_PROBE_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return b"init: up" in shown.stdout


if __name__ == "__main__":
    print(missing_guest_kvm() or "yes")
