"""A Linux guest that starts the agent by itself, with Debian's Python in its initramfs."""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path

from tests import artifacts
from tests.agents import AGENT
from tests.rig.initramfs import newc_entry

MODULES = ("virtio_pci", "virtio_blk", "vmw_vsock_virtio_transport")
PYTHON = "/usr/bin/python3"
LOADER = "/lib64/ld-linux-x86-64.so.2"
# The shell of the console reads the file that ENV names, before its first prompt.
APPEND = "test=shell ENV=/agent-rc"
_RC = """mkdir -p /dev/pts /tmp
mount -t devpts devpts /dev/pts
ip link set lo up
python3 -I /bin/vmm-agent >/agent.log 2>&1 &
unset ENV
"""
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


def initramfs(kernel: artifacts.Kernel, place: Path) -> Path:
    """Write the guest's initramfs to `place`, and return it; see APPEND."""
    base = artifacts.initramfs_with(kernel, MODULES, "vsock").read_bytes()
    folders: dict[str, None] = {"etc": None}
    members = []
    for name, path in files().items():
        folders |= dict.fromkeys(str(one) for one in reversed(Path(name).parents) if one.name)
        members.append((name, stat.S_IFREG | 0o755, path.read_bytes()))
    members += [
        ("agent-rc", stat.S_IFREG | 0o644, _RC.encode()),
        ("etc/passwd", stat.S_IFREG | 0o644, b"root:x:0:0::/:/bin/sh\n"),
        ("etc/group", stat.S_IFREG | 0o644, b"root:x:0:\n"),
    ]
    everything = [(name, stat.S_IFDIR | 0o755, b"") for name in folders] + members
    with place.open("wb") as image:
        image.write(base + bytes(-len(base) % 4))
        for inode, member in enumerate(everything, start=1):
            image.write(newc_entry(inode, *member))
        image.write(newc_entry(0, "TRAILER!!!", 0, b""))
    return place
