"""The rig's kvm-amd module: one function returns at once, all else is unchanged."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.rig.kvm_amd import ModuleError, with_cr8_intercepted

FUNCTION = "svm_update_cr8_intercept"
SIGNATURE = bytes(range(97))
DESCRIPTION = bytes(8) + len(SIGNATURE).to_bytes(4, "big")
SIGNED = SIGNATURE + DESCRIPTION + b"~Module signature appended~\n"
# Another section before the code, and another function before the one that counts.
SOURCE = """
.section .earlier, "ax"
.fill 7, 1, 0x90
.text
svm_update: .byte 0xe8, 0, 0, 0, 0, 0x55
{function}: {landing} .byte {start}, 0, 0, 0, 0, 0x41
svm_later: .byte 0xe8, 0, 0, 0, 0, 0x53
"""


def assembled(
    folder: Path, *, function: str = FUNCTION, start: int = 0xE8, landing: str = ""
) -> bytes:
    """Return an object file whose `function` starts with the byte `start`, after `landing`."""
    if shutil.which("as") is None:
        pytest.skip("as not installed (Debian package binutils)")
    path = folder / "module.ko"
    source = SOURCE.format(function=function, start=start, landing=landing)
    subprocess.run(["as", "-o", path, "-"], input=source, text=True, check=True)
    return path.read_bytes()


@pytest.mark.parametrize("landing", ["", "endbr64;"])
def test_the_function_returns_behind_its_tracers_call(landing: str, tmp_path: Path) -> None:
    """One byte differs, the one after the call; the signature, which is wrong now, is gone."""
    module = assembled(tmp_path, landing=landing)
    changed = with_cr8_intercepted(module + SIGNED)
    at = module.index(bytes([0xE8, 0, 0, 0, 0, 0x41])) + 5
    assert module[:at] + b"\xc3" + module[at + 1 :] == changed
    assert changed == with_cr8_intercepted(module)


def test_another_kernel_is_refused(tmp_path: Path) -> None:
    """A module without the function, or with a different one, is refused."""
    with pytest.raises(ModuleError, match=f"^no function {FUNCTION}$"):
        with_cr8_intercepted(assembled(tmp_path, function=f"{FUNCTION}s"))
    with pytest.raises(ModuleError, match=f"^{FUNCTION}: begins with 0x90, not with a call$"):
        with_cr8_intercepted(assembled(tmp_path, start=0x90))
    with pytest.raises(ModuleError, match=r"^not a module for x86-64$"):
        with_cr8_intercepted(b"MZ")
