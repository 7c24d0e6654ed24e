"""Every way into a kernel, on real KVM: a few instructions check the state at their entry.

Each guest compares the registers and memory that its boot protocol promises, and ends the run
through isa-debug-exit: with 42 if all are right, with 1 if not.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.unit.boot.images import (
    KERNEL_ADDRESS,
    BzImage,
    multiboot_elf,
    openbsd_kernel,
    pvh_kernel,
    vmlinux,
)
from tests.unit.boot.packing import PACKERS
from tests.vmctl_driver import vmctl_run

pytestmark = pytest.mark.kvm

GOOD = 42
STATUS = GOOD << 1 | 1


def _check(*comparisons: bytes) -> bytes:
    """Return code, for 32-bit as for 64-bit mode, that reports whether all are equal."""
    report = (
        b"\xb0\x2a"  # mov al, 42
        b"\xe6\xf4"  # out 0xf4, al
    )
    fail = (
        b"\xb0\x01"  # mov al, 1
        b"\xe6\xf4"  # out 0xf4, al
        b"\xf4"  # hlt
        b"\xeb\xfd"  # jmp to hlt
    )
    code = report + fail
    for comparison in reversed(comparisons):
        # jne to fail, which is the last
        code = comparison + b"\x75" + bytes((len(code) - len(fail),)) + code
    return code


# cmp dword [rsi + 0x202], "HdrS"; cmp word [rsi + 0x1fe], 0xaa55; [esi] in 32-bit mode
LINUX = _check(
    b"\x81\xbe\x02\x02\x00\x00HdrS",
    b"\x66\x81\xbe\xfe\x01\x00\x00\x55\xaa",
)
# cmp dword [ebx], magic; cmp dword [ebx + 4], 1
PVH = _check(b"\x81\x3b\x78\xc5\x6e\x33", b"\x83\x7b\x04\x01")
# cmp eax, magic; cmp dword [ebx + 4], 639
MULTIBOOT = _check(b"\x3d\x02\xb0\xad\x2b", b"\x81\x7b\x04\x7f\x02\x00\x00")
# The kernel's arguments on its stack: cmp dword [esp + 8], sd0a; [esp + 12], 14; [esp + 32], 0x2000
OPENBSD = _check(
    b"\x81\x7c\x24\x08\x04\x00\x00\xa0",
    b"\x83\x7c\x24\x0c\x0e",
    b"\x81\x7c\x24\x20\x00\x20\x00\x00",
)

IMAGES = {
    "bzimage-unpacked": BzImage(PACKERS["zstd"](vmlinux(LINUX))).build(),
    "bzimage-64-bit-entry": BzImage(entry64=LINUX).build(),
    "bzimage-32-bit-entry": BzImage(entry32=LINUX).but(xloadflags=0).build(),
    "vmlinux": vmlinux(LINUX),
    "pvh": pvh_kernel(KERNEL_ADDRESS, PVH),
    "multiboot-elf32": multiboot_elf(code=MULTIBOOT),
    "multiboot-elf64": multiboot_elf(is_64=True, code=MULTIBOOT),
    "openbsd-amd64": openbsd_kernel(code=b"\x90" * 0x10 + OPENBSD),
    "openbsd-i386": openbsd_kernel(is_64=False, code=b"\x90" * 0x10 + OPENBSD),
    "openbsd-gzip": PACKERS["gzip"](openbsd_kernel(code=b"\x90" * 0x10 + OPENBSD)),
}


# A /dev/kvm that only emulates guest kernels may have no 32-bit paging: these run in tests/guest.
NEEDS_GUEST_KVM = ("openbsd-i386",)


def run_image(path: Path, image: bytes) -> tuple[int, bytes]:
    """Run a guest from `image`, written to `path`; return the exit status and the errors."""
    path.write_bytes(image)
    done = subprocess.run(
        vmctl_run("-m", "64M", "-b", path, "--timeout", "20"),
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", [name for name in IMAGES if name not in NEEDS_GUEST_KVM])
def test_kernel_finds_what_its_protocol_promises(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first instruction, registers and memory are as the protocol says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run_image(tmp_path / name, IMAGES[name]) == (STATUS, b"")
