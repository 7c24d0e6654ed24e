"""The numbers and structures of taps and vhost-net agree with the installed kernel headers."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from vmm_kvm.net import abi

NEWER_THAN_6_1 = {"TUN_F_USO4", "TUN_F_USO6"}
SIZES = {
    "struct ifreq": abi.ifreq,
    "struct vhost_vring_state": abi.vhost_vring_state,
    "struct vhost_vring_file": abi.vhost_vring_file,
    "struct vhost_vring_addr": abi.vhost_vring_addr,
    "struct vhost_memory": abi.vhost_memory,
    "struct vhost_memory_region": abi.vhost_memory_region,
    "struct tun_filter": abi.tun_filter,
}


def test_numbers_and_sizes(tmp_path: Path) -> None:
    """Every constant has its value in the headers, and every structure its size."""
    numbers = {
        name: value
        for name, value in vars(abi).items()
        if isinstance(value, int) and name.isupper()
    }
    lines = ["#include <stdio.h>", "#include <net/if.h>"]
    lines += [f"#include <linux/{name}.h>" for name in ("if_tun", "sockios", "vhost")]
    lines.append("int main(void) {")
    for name in numbers:
        lines += [f"#ifdef {name}", f'printf("{name}=%llu\\n", (unsigned long long){name});']
        lines.append("#endif")
    # ifreq is 40 bytes on x86-64; a union follows the flags.
    lines += [f'printf("{name}=%zu\\n", sizeof({name}));' for name in SIZES]
    source, program = tmp_path / "abi.c", tmp_path / "abi"
    source.write_text("\n".join([*lines, "return 0; }", ""]))
    subprocess.run(["gcc", "-o", str(program), str(source)], check=True, capture_output=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    known = dict(line.split("=") for line in printed.splitlines())
    expected = numbers | {name: form.size for name, form in SIZES.items()}
    for name in NEWER_THAN_6_1 - known.keys():
        del expected[name]
    assert {name: int(value) for name, value in known.items()} == expected


def test_a_ring_address_is_laid_out_as_in_c() -> None:
    """Descriptors, used, available: in this order, each 64 bits, after two of 32."""
    packed = abi.vhost_vring_addr.pack(1, 0, 2, 3, 4, 5)
    assert struct.unpack("<IIQQQQ", packed) == (1, 0, 2, 3, 4, 5)
