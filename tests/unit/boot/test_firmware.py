"""Finding installed firmware, and the file that keeps a UEFI guest's variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm_kvm.arch.x86.bios import FirmwareImage
from vmm_kvm.boot import firmware
from vmm_kvm.boot.firmware import BIOS, UEFI, Firmware, find_firmware
from vmm_kvm.boot.nvram import open_variables
from vmm_kvm.errors import BootError, ImageError

PAGE = 4096


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the only place with firmware."""
    code, variables = f"{tmp_path}/code.fd", f"{tmp_path}/vars.fd"
    known = {
        BIOS: (Firmware(f"{tmp_path}/bios-256k.bin"), Firmware(f"{tmp_path}/bios.bin")),
        UEFI: (Firmware(code, variables),),
    }
    monkeypatch.setattr(firmware, "KNOWN", known)
    return tmp_path


def test_the_first_that_is_installed(installed: Path) -> None:
    """The second choice is used while the first is missing."""
    (installed / "bios.bin").touch()
    assert find_firmware("bios").code == f"{installed}/bios.bin"
    (installed / "bios-256k.bin").touch()
    assert find_firmware("bios").code == f"{installed}/bios-256k.bin"


def test_nothing_is_installed(installed: Path) -> None:
    """If no firmware is installed, one line says what to install."""
    assert not list(installed.iterdir())
    with pytest.raises(BootError, match=r"^no BIOS firmware found: install the package seabios"):
        find_firmware("bios")
    with pytest.raises(BootError, match=r"^no UEFI firmware found: install the package ovmf"):
        find_firmware("uefi")


def test_uefi_needs_both_files(installed: Path) -> None:
    """Code without the template of variables is not found."""
    (installed / "code.fd").touch()
    with pytest.raises(BootError):
        find_firmware("uefi")
    (installed / "vars.fd").touch()
    expected = Firmware(f"{installed}/code.fd", f"{installed}/vars.fd")
    assert find_firmware("uefi") == expected
    assert find_firmware(f"{installed}/code.fd") == expected


def test_any_other_path_is_taken_as_it_is(installed: Path) -> None:
    """A path is taken without a check: opening it shows whether it exists."""
    assert find_firmware(f"{installed}/own.bin") == Firmware(f"{installed}/own.bin")


@pytest.mark.parametrize(("start", "is_uefi"), [(b"_FVH", True), (b"\0\0\0\0", False)])
def test_uefi_is_known_by_its_volume(start: bytes, is_uefi: bool) -> None:
    """UEFI is known by the signature of a firmware volume, at byte 40, also of a padded file."""
    contents = (bytes(40) + start).ljust(PAGE - 512, b"\0")
    image = FirmwareImage("x", contents.rjust(PAGE, b"\xff"), len(contents))
    assert image.is_uefi == is_uefi


@pytest.fixture
def template(tmp_path: Path) -> str:
    """The initial variables: three pages."""
    path = tmp_path / "template.fd"
    path.write_bytes(bytes(range(256)) * (3 * PAGE // 256))
    return str(path)


def test_variables_begin_as_the_template(template: str, tmp_path: Path) -> None:
    """The file is made, and is a copy; so is the memory."""
    path = tmp_path / "guest.nvram"
    with open_variables(template, str(path)) as variables:
        assert bytes(variables.array) == path.read_bytes() == Path(template).read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["guest.nvram", "template.fd"]


def test_variables_are_kept(template: str, tmp_path: Path) -> None:
    """Stored variables are there at the next opening, and the template is unchanged."""
    path = str(tmp_path / "guest.nvram")
    before = Path(template).read_bytes()
    with open_variables(template, path) as variables:
        variables.array[5000:5003] = b"new"
        variables.store(5000, memoryview(b"new"))
    with open_variables(template, path) as variables:
        assert variables.array[5000:5003] == b"new"
        assert variables.size == 3 * PAGE
    assert Path(template).read_bytes() == before


def test_variables_that_nobody_keeps(template: str) -> None:
    """Without a file, storing does nothing."""
    with open_variables(template, None) as variables:
        variables.store(0, memoryview(b"new"))
        assert bytes(variables.array) == Path(template).read_bytes()


def test_one_machine_has_them_at_a_time(template: str, tmp_path: Path) -> None:
    """A second opening is refused until the first is closed."""
    path = str(tmp_path / "guest.nvram")
    with open_variables(template, path), pytest.raises(ImageError, match=r"guest\.nvram: "):
        open_variables(template, path)
    open_variables(template, path).close()


@pytest.mark.parametrize("size", [PAGE, 4 * PAGE])
def test_variables_of_another_firmware(template: str, tmp_path: Path, size: int) -> None:
    """A file of another size is refused, and left alone."""
    path = tmp_path / "guest.nvram"
    path.write_bytes(bytes(size))
    with pytest.raises(BootError, match=rf"{size} bytes, but this firmware has 12288"):
        open_variables(template, str(path))
    assert path.read_bytes() == bytes(size)
    path.unlink()


def test_files_that_are_not_there(template: str, tmp_path: Path) -> None:
    """A missing template or directory, or an invalid template, is reported in one line."""
    with pytest.raises(BootError, match=r"nowhere: No such file"):
        open_variables(str(tmp_path / "nowhere"), None)
    with pytest.raises(BootError, match=r"nowhere/guest.nvram: No such file"):
        open_variables(template, str(tmp_path / "nowhere" / "guest.nvram"))
    odd = tmp_path / "odd"
    odd.write_bytes(b"x")
    with pytest.raises(BootError, match="odd: not the contents of a flash memory"):
        open_variables(str(odd), None)
