"""The numbers and structures of FUSE agree with the installed kernel headers."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from vmm_kvm.fs import abi

STRUCTURES = {
    "IN_HEADER": "fuse_in_header",
    "OUT_HEADER": "fuse_out_header",
    "ATTR": "fuse_attr",
    "INIT_OUT": "fuse_init_out",
    "FORGET_IN": "fuse_forget_in",
    "FORGET_ONE": "fuse_forget_one",
    "BATCH_FORGET_IN": "fuse_batch_forget_in",
    "GETATTR_IN": "fuse_getattr_in",
    "SETATTR_IN": "fuse_setattr_in",
    "MKNOD_IN": "fuse_mknod_in",
    "MKDIR_IN": "fuse_mkdir_in",
    "RENAME_IN": "fuse_rename_in",
    "RENAME2_IN": "fuse_rename2_in",
    "LINK_IN": "fuse_link_in",
    "OPEN_IN": "fuse_open_in",
    "OPEN_OUT": "fuse_open_out",
    "CREATE_IN": "fuse_create_in",
    "RELEASE_IN": "fuse_release_in",
    "READ_IN": "fuse_read_in",
    "WRITE_IN": "fuse_write_in",
    "WRITE_OUT": "fuse_write_out",
    "STATFS_OUT": "fuse_statfs_out",
    "FSYNC_IN": "fuse_fsync_in",
    "FALLOCATE_IN": "fuse_fallocate_in",
    "LSEEK_IN": "fuse_lseek_in",
    "LSEEK_OUT": "fuse_lseek_out",
    "DIRENT": "fuse_dirent",
}
"""Of each name its structure; the others are beginnings of one, with the field that follows."""
BEGINNINGS = {
    "ENTRY_OUT": ("fuse_entry_out", "attr"),
    "ATTR_OUT": ("fuse_attr_out", "attr"),
    "INIT_IN": ("fuse_init_in", "flags2"),
}


def test_numbers_and_sizes(tmp_path: Path) -> None:
    """Every constant has the header's value, every structure the header's size."""
    constants = {
        name: value
        for name, value in vars(abi).items()
        if isinstance(value, int) and name.isupper() and name != "FUSE_KERNEL_MINOR_VERSION"
    }
    sizes = {
        name: value.size for name, value in vars(abi).items() if isinstance(value, struct.Struct)
    }
    lines = ["#include <stdio.h>", "#include <stddef.h>", "#include <linux/fuse.h>", "int main() {"]
    lines += [f'printf("{name} %llu\\n", (unsigned long long)({name}));' for name in constants]
    lines += [f'printf("{a} %zu\\n", sizeof(struct {b}));' for a, b in STRUCTURES.items()]
    lines += [
        f'printf("{a} %zu\\n", offsetof(struct {b}, {field}));'
        for a, (b, field) in BEGINNINGS.items()
    ]
    source, program = tmp_path / "abi.c", tmp_path / "abi"
    source.write_text("\n".join([*lines, "return 0; }", ""]))
    subprocess.run(["gcc", "-o", str(program), str(source)], check=True, capture_output=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    known = {name: int(value) for name, value in map(str.split, printed.splitlines())}
    assert known == constants | sizes
