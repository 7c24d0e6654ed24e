"""The initramfs builder: cpio reads its archive, in the order that /init relies on."""

from __future__ import annotations

import lzma
import stat
import subprocess
from pathlib import Path

import pytest

from tests.rig import initramfs

TRAILER = "TRAILER!!!"


def members(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Read a newc archive: name to mode and data."""
    found = {}
    offset = 0
    while True:
        assert archive[offset : offset + 6] == b"070701"
        fields = [
            int(archive[start : start + 8], 16) for start in range(offset + 6, offset + 110, 8)
        ]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[offset + 110 : offset + 110 + name_size - 1].decode()
        offset = -(-(offset + 110 + name_size) // 4) * 4
        found[name] = (mode, archive[offset : offset + size])
        offset = -(-(offset + size) // 4) * 4
        if name == TRAILER:
            assert offset == len(archive)
            return found


@pytest.fixture
def busybox(tmp_path: Path) -> Path:
    """A file in place of the busybox program."""
    path = tmp_path / "busybox"
    path.write_bytes(b"\x7fELF busybox")
    return path


def test_an_archive_holds_busybox_and_its_names(busybox: Path) -> None:
    """Busybox is executable, and every applet is a symbolic link to it."""
    found = members(initramfs.archive(busybox, ["busybox", "sh", "ls"], [], "#!init"))
    assert found["bin/busybox"] == (stat.S_IFREG | 0o755, b"\x7fELF busybox")
    assert found["bin/sh"] == (stat.S_IFLNK | 0o777, b"busybox")
    assert found["bin/ls"] == (stat.S_IFLNK | 0o777, b"busybox")
    assert found["init"] == (stat.S_IFREG | 0o755, b"#!init")


def test_mount_points_come_before_what_lies_in_them(busybox: Path) -> None:
    """The kernel makes no missing folders: each precedes its files."""
    names = list(members(initramfs.archive(busybox, ["sh"], [], "")))
    assert {"dev", "proc", "sys"} <= set(names)
    assert names.index("bin") < names.index("bin/busybox")


def test_modules_are_numbered_in_load_order_and_unpacked(busybox: Path, tmp_path: Path) -> None:
    """A shell's `*.ko` then loads them in order; insmod of busybox reads no xz."""
    plain, packed = tmp_path / "zeta.ko", tmp_path / "alpha.ko.xz"
    plain.write_bytes(b"zeta")
    packed.write_bytes(lzma.compress(b"alpha"))
    found = members(initramfs.archive(busybox, [], [plain, packed], ""))
    loaded = [(name, data) for name, (_, data) in found.items() if name.endswith(".ko")]
    assert loaded == [("modules/000-zeta.ko", b"zeta"), ("modules/001-alpha.ko", b"alpha")]


def test_the_same_parts_give_the_same_bytes(busybox: Path) -> None:
    """An archive holds neither a time nor an owner."""
    first = initramfs.archive(busybox, ["sh"], [], "x")
    busybox.touch()
    assert initramfs.archive(busybox, ["sh"], [], "x") == first


def test_a_recipe_changes_with_each_part(busybox: Path) -> None:
    """A cached image is not used for another /init or other modules."""
    recipes = {
        initramfs.recipe(busybox, [], "a"),
        initramfs.recipe(busybox, [], "b"),
        initramfs.recipe(busybox, [Path("x.ko")], "a"),
    }
    assert len(recipes) == 3


@pytest.mark.parametrize("script", [initramfs.GUEST_INIT, initramfs.RIG_INIT])
def test_the_scripts_parse(script: str) -> None:
    """Each /init is a shell script without syntax errors."""
    parsed = subprocess.run(["/bin/sh", "-n"], input=script.encode(), check=False)
    assert parsed.returncode == 0


def test_cpio_reads_an_archive(busybox: Path) -> None:
    """GNU cpio lists the archive's members."""
    archive = initramfs.archive(busybox, ["sh"], [], "#!init")
    listed = subprocess.run(
        ["cpio", "-it", "--quiet"], input=archive, capture_output=True, check=True
    )
    assert listed.stdout.decode().split() == [name for name in members(archive) if name != TRAILER]
