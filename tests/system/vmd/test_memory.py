"""The memory of VM processes, as the kernel reports it."""

from __future__ import annotations

import ctypes
import errno
from pathlib import Path

import pytest

from tests.system.vmd.conftest import missing_separation
from tests.system.vmd.daemon import Daemon, vm_block

pytestmark = [pytest.mark.kvm, pytest.mark.root]

_PR_GET_MEMORY_MERGE = 68
_PMEM_SIZE = 2 << 20
_MERGEABLE = "mg"


def _flags_by_name(pid: object) -> dict[str, list[list[str]]]:
    """Return the flags of a process's mappings by the mapped file. Source: proc_pid_smaps(5)."""
    found: dict[str, list[list[str]]] = {}
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if words[0] == "VmFlags:":
            found.setdefault(name, []).append(words[1:])
        elif not words[0].endswith(":"):
            name = " ".join(words[5:])
    return found


def test_equal_pages_may_be_merged_but_none_that_a_guest_writes(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The interpreter's memory is mergeable; the guest's, and its private disk, are not."""
    if reason := missing_separation():
        pytest.skip(reason)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_GET_MEMORY_MERGE, 0, 0, 0, 0) < 0 and ctypes.get_errno() == errno.EINVAL:
        pytest.skip("this kernel merges no memory of whole processes")
    image = tmp_path_factory.mktemp("pmem") / "disk.raw"
    image.write_bytes(bytes(_PMEM_SIZE))
    disk = f'disk "{image}" format pmem {{ private }}'
    with (
        Daemon(tmp_path, vm_block("one", disk), is_user=False) as vmd,
        vmd.client() as client,
    ):
        started = client.ask("start", name="one")
        assert started["type"] == "started", started
        flags = _flags_by_name(started["pid"])
    assert all(_MERGEABLE in found for found in flags["[heap]"])
    assert all(_MERGEABLE not in found for found in flags[str(image)])
    # The guest's RAM is the only memory in huge pages.
    assert all("hg" not in found or _MERGEABLE not in found for found in flags[""])
    assert any("hg" in found for found in flags[""])
