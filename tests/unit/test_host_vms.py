"""Other programs' VMs, found in a file system laid out like /proc."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from vmm_kvm.bits import KIB, MIB
from vmm_kvm.kvm.host import HostVm, host_vms

QEMU_SMAPS = """\
55d000000000-55d000800000 r-xp 00000000 fe:00 1234                       /usr/bin/qemu
Size:               8192 kB
Rss:                6000 kB
7f0000000000-7f0020000000 rw-p 00000000 00:00 0
Size:             524288 kB
Rss:              102400 kB
Pss:              102400 kB
VmFlags: rd wr mr mw me dc ac sd hg
7f0040000000-7f0044000000 rw-s 00000000 00:01 77                         /memfd:ram (deleted)
Size:              65536 kB
Rss:                1024 kB
7f0050000000-7f0050800000 rw-p 00000000 00:00 0                          [heap]
Size:               8192 kB
Rss:                8000 kB
"""


def _process(
    proc: Path,
    pid: int,
    links: Sequence[str],
    *,
    arguments: Sequence[str] = ("vmm",),
    smaps: str = QEMU_SMAPS,
) -> None:
    directory = proc / str(pid)
    (directory / "fd").mkdir(parents=True)
    for number, link in enumerate(links):
        (directory / "fd" / str(number)).symlink_to(link)
    (directory / "cmdline").write_bytes(b"".join(a.encode() + b"\0" for a in arguments))
    (directory / "comm").write_text("program\n")
    (directory / "smaps").write_text(smaps)


def _links(*vcpus: str) -> list[str]:
    vcpu_links = [f"anon_inode:kvm-vcpu{vcpu}" for vcpu in vcpus]
    return ["/dev/kvm", "anon_inode:kvm-vm", *vcpu_links, "socket:[5]"]


def test_a_vm(tmp_path: Path) -> None:
    """A VM has its vCPUs, its memory by the largest mappings, and its name."""
    arguments = ("qemu", "-name", "guest=web,debug-threads=on", "-m", "512M")
    _process(tmp_path, 42, _links(":0", ":1"), arguments=arguments)
    expected = HostVm(42, "web", 1, 2, (512 + 64) * MIB, (102400 + 1024) * KIB)
    assert host_vms(tmp_path) == [expected]


def test_other_processes(tmp_path: Path) -> None:
    """Processes without a VM, and entries that are no processes, do not count."""
    _process(tmp_path, 1, ["/dev/kvm", "socket:[7]"])
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").touch()
    assert host_vms(tmp_path) == []


def test_order_and_exception(tmp_path: Path) -> None:
    """VMs come by process id, without the one to leave out."""
    for pid in (300, 20, 100):
        _process(tmp_path, pid, _links(":0"))
    assert [vm.pid for vm in host_vms(tmp_path, but=100)] == [20, 300]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("qemu", "-name", "web"), "web"),
        (("qemu", "-name", "web,process=x"), "web"),
        (("qemu", "-name", "debug-threads=on,guest=web"), "web"),
        (("lkvm", "run", "--name", "web"), "web"),
        (("lkvm", "run", "--name=web"), "web"),
        (("firecracker", "--id", "web", "--api-sock", "x"), "web"),
        (("qemu", "-name"), "program"),
        (("qemu",), "program"),
        ((), "program"),
    ],
)
def test_names(tmp_path: Path, arguments: Sequence[str], name: str) -> None:
    """The option that names a VM is known in its usual forms; else the program's name serves."""
    _process(tmp_path, 42, _links(":0"), arguments=arguments)
    assert [vm.name for vm in host_vms(tmp_path)] == [name]


@pytest.mark.parametrize(
    ("links", "vms", "vcpus"),
    [
        (_links(), 1, 0),
        (_links(":0", ":0", ":1", ":1"), 1, 2),  # each open twice
        (_links(":0") + _links(":0", ":1"), 2, 3),
        (_links("", ""), 1, 2),  # without an index, as in old kernels
    ],
)
def test_counts(tmp_path: Path, links: list[str], vms: int, vcpus: int) -> None:
    """A vCPU that is open twice counts once; two VMs have a vCPU 0 each."""
    _process(tmp_path, 42, links)
    assert [(vm.vms, vm.vcpus) for vm in host_vms(tmp_path)] == [(vms, vcpus)]


def test_process_that_ends_meanwhile(tmp_path: Path) -> None:
    """A process without readable files is left out, the others are not."""
    _process(tmp_path, 42, _links(":0"))
    _process(tmp_path, 43, _links(":0"))
    (tmp_path / "42" / "smaps").unlink()
    (tmp_path / "44").mkdir()
    assert [vm.pid for vm in host_vms(tmp_path)] == [43]


def test_no_mappings(tmp_path: Path) -> None:
    """A process that is about to end may have no memory any more."""
    _process(tmp_path, 42, _links(":0"), smaps="")
    assert [(vm.memory_size, vm.resident) for vm in host_vms(tmp_path)] == [(0, 0)]
