"""Assemble the guest images beside this file: `python bios/build.py [NAME ...]`.

GNU as and ld make a flat 64 KiB firmware image of NAME.S, the same bytes on every machine: no
time stamps, no paths, every fill byte given. Prints the SHA-256 of each image.
"""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vmm_kvm.standard_streams import run_program

IMAGES = ("selftest", "hostile")
IMAGE_SIZE = 64 * 1024
_SOURCES = Path(__file__).resolve().parent


def build(name: str, output: Path) -> str:
    """Assemble and link the image `name` into the file `output`, and return its SHA-256.

    Raises:
        FileNotFoundError: `as` or `ld` is not installed (Debian: binutils).
        subprocess.CalledProcessError: the source has errors; they are on stderr.
        ValueError: the image is not 64 KiB: code has run into the reset page.
    """
    with tempfile.TemporaryDirectory() as scratch:
        linkable = Path(scratch, f"{name}.o")
        subprocess.run(
            ["as", "--64", "--fatal-warnings", "-o", linkable, f"{name}.S"],
            cwd=_SOURCES,
            check=True,
        )
        subprocess.run(
            ["ld", "-T", "image.ld", "--oformat", "binary", "-o", output, linkable],
            cwd=_SOURCES,
            check=True,
        )
    image = output.read_bytes()
    if len(image) != IMAGE_SIZE:
        raise ValueError(f"{output}: {len(image)} bytes, not {IMAGE_SIZE}")
    output.chmod(0o644)
    return hashlib.sha256(image).hexdigest()


def main(names: list[str]) -> int:
    """Rebuild the images `names`, all of them if there are none, in place."""
    for name in names or IMAGES:
        digest = build(name, _SOURCES / f"{name}.bin")
        sys.stdout.write(f"{digest}  {name}.bin\n")
    return 0


if __name__ == "__main__":
    run_program("build", lambda: main(sys.argv[1:]))
