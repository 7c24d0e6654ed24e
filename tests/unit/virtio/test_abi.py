"""The numbers of virtio agree with the installed kernel headers."""

from __future__ import annotations

import subprocess
from pathlib import Path

from vmm_kvm.virtio import abi

HEADERS = (
    "ids",
    "config",
    "ring",
    "pci",
    "blk",
    "net",
    "scsi",
    "console",
    "pmem",
    "vsock",
    "balloon",
)
# Newer than the headers of Linux 6.1; any other missing name is a mistake in the table.
NEWER_THAN_6_1 = {f"VIRTIO_NET_F_{name}" for name in ("GUEST_USO4", "GUEST_USO6", "HOST_USO")}


def test_numbers(tmp_path: Path) -> None:
    """Every constant has its value in the header of its name."""
    constants = {
        name: value
        for name, value in vars(abi).items()
        if isinstance(value, int) and name.isupper()
    }
    lines = ["#include <stdio.h>"]
    lines += [f"#include <linux/virtio_{header}.h>" for header in HEADERS]
    lines.append("int main(void) {")
    for name in constants:
        lines += [
            f"#ifdef {name}",
            f'printf("{name} %llu\\n", (unsigned long long)({name}));',
            "#endif",
        ]
    source, program = tmp_path / "abi.c", tmp_path / "abi"
    source.write_text("\n".join([*lines, "return 0; }", ""]))
    subprocess.run(["gcc", "-o", str(program), str(source)], check=True, capture_output=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    known = {name: int(value) for name, value in map(str.split, printed.splitlines())}
    newer = {name: constants[name] for name in NEWER_THAN_6_1 - known.keys()}
    assert known | newer == constants
