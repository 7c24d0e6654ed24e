"""Names with bytes that are no UTF-8, and with control characters, wherever a name is shown."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.vmctl_driver import ROOT, VMCTL

BAD = os.fsdecode(b"b\xff\x1b[2J")
SHOWN = "b\\xff\\x1b[2J"
VMD = VMCTL.parent / "vmd"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a directory with such files."""
    monkeypatch.chdir(tmp_path)
    for words in (["-s", "4M", f"{BAD}.qcow2"], ["-b", f"{BAD}.qcow2", "over.qcow2"]):
        assert run(VMCTL, "create", *words)[0] == 0
    Path(f"{BAD}.img").write_bytes(b"KDMV".ljust(1 << 20, b"\0"))
    Path("bad.conf").write_bytes(os.fsencode(f'include "{BAD}.conf"\ninclude "*.part"\n'))
    Path(f"{BAD}.conf").write_bytes(os.fsencode(f'vm "x" {{ owner "{BAD}" }}\n'))
    Path("disk.conf").write_bytes(os.fsencode(f'vm "x" {{ disk "/{BAD}" }}\n'))
    Path(f"{BAD}.part").write_bytes(b"mistake\n")
    return tmp_path


def run(*words: str | Path) -> tuple[int, str]:
    """Run a program in a UTF-8 locale; returns its status, and output and errors."""
    done = subprocess.run(
        words,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C.UTF-8", "VMD_SOCKET": "/none", "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    return done.returncode, os.fsdecode(done.stdout)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("image info BAD.qcow2", 0),
        ("image info over.qcow2", 0),
        ("create BAD", 1),
        ("create -s BAD x", 1),
        ("create -i BAD x", 1),
        ("create -i BAD.img x", 1),
        ("create -b BAD x.qcow2", 1),
        ("create -s 1M BAD.vmdk", 1),
        ("create -s 1M BAD.gz", 1),
        ("image resize BAD.qcow2 1M", 1),
        ("image pull BAD", 1),
        ("image rm BAD", 1),
        ("BAD", 1),
        ("help BAD", 1),
        ("status --BAD", 1),
        ("ssh BAD", 1),
        ("wait --for BAD x", 1),
        ("wait --timeout BAD x", 1),
        ("start -b BAD x", 1),
        ("start -r BAD x", 1),
        ("run --selftest -d BAD", 1),
        ("run --selftest -i BAD", 1),
        ("run --selftest -n BAD", 1),
        ("run --selftest -B BAD", 1),
        ("run --selftest -p BAD", 1),
        ("run --selftest --append BAD", 1),
        ("run --selftest --initrd BAD", 1),
        ("run --selftest --forward BAD", 1),
        ("run --selftest --gdb BAD/x", 1),
        ("run --selftest --console-log BAD/x", 1),
        ("run --selftest --wait BAD", 1),
    ],
)
def test_vmctl(line: str, status: int) -> None:
    """The name is shown with escapes."""
    got, told = run(VMCTL, *(word.replace("BAD", BAD) for word in line.split(" ")))
    assert (got, "Traceback" in told, BAD in told) == (status, False, False)
    assert SHOWN in told


@pytest.mark.parametrize("verb", ["info", "check"])
@pytest.mark.parametrize("as_json", [True, False])
def test_sound_images(verb: str, as_json: bool) -> None:
    """A sound image is sound, whatever its name."""
    options = ["--json"] if as_json else []
    for name in (f"{BAD}.qcow2", "over.qcow2"):
        status, told = run(VMCTL, "image", verb, *options, name)
        assert (status, "Traceback" in told, BAD in told) == (0, False, False)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["-f", "bad.conf"], f"{SHOWN}.conf:1: failed to get user: {SHOWN}"),
        (["-f", "bad.conf"], f"{SHOWN}.part:1: syntax error"),
        (["-f", f"{BAD}.conf"], f"{SHOWN}.conf:1: failed to get user: {SHOWN}"),
        (["-f", f"no{BAD}.conf"], f"failed to open no{SHOWN}.conf"),
        (["-f", "disk.conf"], f"failed to parse disks: /{SHOWN}"),
        (["-D", BAD, "-f", "disk.conf"], f"could not parse macro definition {SHOWN}"),
    ],
)
def test_vmd(words: list[str], shown: str) -> None:
    """The daemon's check shows names of files, users and disks with escapes."""
    status, told = run(VMD, "-n", *words)
    assert (status, BAD in told, shown in told) == (1, False, True), told
