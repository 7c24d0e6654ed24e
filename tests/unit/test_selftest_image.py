"""The committed guest images agree with their sources."""

import shutil
from pathlib import Path

import pytest

from bios.build import IMAGE_SIZE, IMAGES, build

_BIOS = Path(__file__).resolve().parents[2] / "bios"


@pytest.mark.parametrize("name", IMAGES)
def test_rebuilding_gives_the_committed_bytes(name: str, tmp_path: Path) -> None:
    """Assembling the source again gives the committed image, byte for byte."""
    missing = [tool for tool in ("as", "ld") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed (Debian package binutils)")
    rebuilt = tmp_path / f"{name}.bin"
    build(name, rebuilt)
    # Compare without showing: a difference would print both images.
    assert (_BIOS / f"{name}.bin").read_bytes() == rebuilt.read_bytes(), (
        f"bios/{name}.bin is stale: run python bios/build.py"
    )


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("entry", [-16, -4096], ids=["reset", "start-up page"])
def test_an_image_starts_with_a_jump_below_1_mib(name: str, entry: int) -> None:
    """The reset vector and the page of start-up IPIs hold a far jump into segment f000."""
    image = (_BIOS / f"{name}.bin").read_bytes()
    assert len(image) == IMAGE_SIZE
    assert bytes.fromhex("ea") == image[entry:][:1]
    assert bytes.fromhex("00f0") == image[entry:][3:5]
