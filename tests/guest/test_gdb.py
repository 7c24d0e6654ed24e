"""Debugging a kernel, and watchpoints, which a KVM that emulates guests does not check."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from tests import artifacts
from tests import debugged_guest as guest
from tests.debugging import debugged, run_gdb, wait_for
from tests.guest.linux_guest import ours

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(600)]

FUNCTIONS = ("sync", "sethostname", "sysinfo", "umask")
"""Functions of system calls, as many as debug registers. The rig does not intercept INT3."""


def test_memory_is_watched(tmp_path: Path) -> None:
    """A write to a watched number stops the guest, and shows the old and the new value."""
    script = f"""
hbreak *{guest.AFTER_COUNTING:#x}
continue
delete
watch *(int *){guest.COUNTER:#x}
continue
"""
    with debugged(tmp_path, ",wait") as path:
        seen = run_gdb(path, script)
    assert re.search(r"Old value = 1\s+New value = 2", seen), seen


def test_a_kernel_stops_at_its_functions(cloud_kernel: artifacts.Kernel, tmp_path: Path) -> None:
    """With breakpoints in four functions of Linux, it stops in the called one, and continues."""
    path = tmp_path / "gdb"
    with ours(cloud_kernel, "shell", cpus=2, options=["--gdb", str(path)]) as vm:
        vm.expect("# ")
        wait_for(path)
        vm.send(f"grep -E ' __x64_sys_({'|'.join(FUNCTIONS)})$' /proc/kallsyms; echo lis''ted\n")
        vm.expect("listed")
        names = {
            name: int(address, 16)
            for address, name in re.findall(
                r"([0-9a-f]{16}) . __x64_sys_(\w+)", vm.output.decode("latin-1")
            )
        }
        assert set(names) == set(FUNCTIONS)
        script = "\n".join(
            (
                *(f"break *{address:#x}" for address in names.values()),
                "continue",
                "print/x $rip",
                "info threads",
                "thread apply all print $rip != 0",
                "stepi",
                "print/x $rip",
                "delete",
            )
        )
        seen: list[str] = []
        debugger = threading.Thread(target=lambda: seen.append(run_gdb(path, script)))
        debugger.start()
        vm.send("while :; do sync; done & loop=$!\n")
        debugger.join()
        assert f"= {names['sync']:#x}" in seen[0], (seen, vm.output[-2000:], vm.errors)
        vm.send("kill $loop; hostname de''bugged; hostname\n")
        vm.expect("debugged")
        vm.send("poweroff -f\n")
        assert vm.wait() == 0, vm.errors
    assert f"= {names['sync']:#x}" in seen[0], seen
    assert seen[0].count("= 1\n") == 2, seen
    stepped = [
        int(value, 16) for value in re.findall(r"^\$\d+ = (0x[0-9a-f]+)$", seen[0], re.MULTILINE)
    ]
    assert 0 < abs(stepped[-1] - names["sync"]) < 16, seen
