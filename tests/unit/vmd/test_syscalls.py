"""The numbers of system calls, against the kernel's own header."""

from __future__ import annotations

import subprocess

from vmd.confine.syscalls import SYSCALLS


def test_numbers_are_the_kernels() -> None:
    """Each name has its number in <asm/unistd.h>."""
    source = "#include <asm/unistd.h>\n" + "".join(f"{name} __NR_{name}\n" for name in SYSCALLS)
    expanded = subprocess.run(
        ["gcc", "-E", "-P", "-xc", "-"], input=source, capture_output=True, text=True, check=True
    ).stdout
    assert "".join(f"{name} {number}\n" for name, number in SYSCALLS.items()) in expanded + "\n"
