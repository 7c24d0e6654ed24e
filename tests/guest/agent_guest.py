"""What a Linux guest with busybox alone needs for the agent: Debian's Python, and modules."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.agents import AGENT

MODULES = ("virtio_pci", "virtio_blk", "vmw_vsock_virtio_transport")
PYTHON = "/usr/bin/python3"
LOADER = "/lib64/ld-linux-x86-64.so.2"
_FILES = """
import json, runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    pass
names = ("__file__", "__cached__")
found = [getattr(one, name, None) for one in sys.modules.values() for name in names]
found += [line.split()[-1] for line in open("/proc/self/maps") if "/" in line]
print(json.dumps(sorted({one for one in found if one and "/locale/" not in one})))
"""


def files() -> dict[str, Path]:
    """Return the agent, and the files of Debian's Python that it uses, by the guest's names."""
    done = subprocess.run(
        [PYTHON, "-I", "-c", _FILES, AGENT], check=True, capture_output=True, text=True
    )
    found = {}
    for name in json.loads(done.stdout):
        path = Path(name)
        if not path.is_file() or path == AGENT:
            continue
        # Libraries are looked for by another name than they are mapped by.
        stem = path.name.partition(".so")[0]
        others = path.parent.glob(f"{stem}.so*") if ".so" in path.name else (path,)
        for one in others:
            found[str(one).removeprefix("/")] = one.resolve()
    found[LOADER.removeprefix("/")] = Path(LOADER).resolve()
    found["bin/python3"] = Path(PYTHON).resolve()
    found["bin/vmm-agent"] = AGENT
    return found
