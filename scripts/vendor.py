"""Fetch the terminal of `vmctl web` from npm, as released, into vmctl/web/page/xterm/.

npm checks what it downloads; this checks it once more by the hashes below. A test compares the
files with those that docs/web.md names.
"""

import base64
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vmm_kvm.standard_streams import run_program  # noqa: E402 - found by the line above

PLACE = ROOT / "vmctl" / "web" / "page" / "xterm"
PACKAGES = {
    "@xterm/xterm@6.0.0": (
        "TQwDdQGtwwDt+2cgKDLn0IRaSxYu1tSUjgKarSDkUM0ZNiSRXFpjxEsvc/Zgc5kq5omJ+V0a8/kIM2WD3sMOYg==",
        {"lib/xterm.mjs": "xterm.mjs", "css/xterm.css": "xterm.css", "LICENSE": "LICENSE.xterm"},
    ),
    "@xterm/addon-fit@0.11.0": (
        "jYcgT6xtVYhnhgxh3QgYDnnNMYTcf8ElbxxFzX0IZo+vabQqSPAjC3c1wJrKB5E19VwQei89QCiZZP86DCPF7g==",
        {"lib/addon-fit.mjs": "addon-fit.mjs", "LICENSE": "LICENSE.addon-fit"},
    ),
}
"""By package: the SHA-512 of its archive, as npm tells it, and the files that are taken."""


def main() -> int:
    """Fetch them; returns the exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        for package, (wanted, files) in PACKAGES.items():
            command = ["npm", "pack", "--json", "--pack-destination", scratch, package]
            packed = subprocess.run(command, check=True, capture_output=True, text=True)
            archive = Path(scratch) / Path(json.loads(packed.stdout)[0]["filename"]).name
            found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
            if found != wanted:
                print(f"vendor: {package}: SHA-512 is {found}, not {wanted}", file=sys.stderr)
                return 1
            with tarfile.open(archive) as tar:
                for inside, name in files.items():
                    member = tar.extractfile(f"package/{inside}")
                    assert member is not None
                    (PLACE / name).write_bytes(member.read())
                    print(PLACE / name)
    return 0


if __name__ == "__main__":
    run_program("vendor", main)
