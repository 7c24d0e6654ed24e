"""The layer rules: each folder's and module's allowed imports, compared with every import."""

from __future__ import annotations

import re
import sys

import pytest

from scripts import structure
from tests import layers
from tests.layers import Import, layer_of

FILES = layers.module_files()
IMPORTS = layers.all_imports()

# Codecs that a compressed kernel or disk cluster needs; imported there and nowhere else.
CODECS = ("zstandard", "lz4")
# Commands that run a VM in this very process, without a daemon, import the hypervisor.
VMCTL_WITH_HYPERVISOR = (
    *(
        "vmctl.foreground.run",
        "vmctl.foreground.nics",
        "vmctl.foreground.disks",
        "vmctl.doctor",
        "vmctl.foreground.stdio",
        "vmctl.foreground.restoring",
    ),
    "vmctl.foreground.vsock",
)
# Pure modules decide; they are given all facts, time included.
PURE = (
    *("vmm_kvm.bits", "vmm_kvm.irq", "vmm_kvm.bus", "vmm_kvm.limits", "vmm_kvm.arch.x86.e820"),
    *("vmm_kvm.arch.x86.layout", "vmm_kvm.arch.x86.entry", "vmm_kvm.arch.x86.cpuid"),
    *("vmm_kvm.net.ethernet", "vmm_kvm.net.abi"),
    *("vmm_kvm.scsi.spc", "vmm_kvm.scsi.mmc", "vmm_kvm.scsi.cdrom"),
    "vmd.rules",
    *("vmd.config.model", "vmd.config.lexer", "vmd.config.grammar", "vmd.config.values"),
    *("vmd.config.interfaces", "vmd.config.vms", "vmd.config.parser", "vmd.config.check"),
    *("vmd.config.text", "vmd.config.sizes"),
)
IMPURE = {"os", "socket", "time", "asyncio", "logging", "threading"}
# A bus holds one lock per device, which its docstring describes.
PURE_WITH_LOCK = {"vmm_kvm.bus"}
# Modules that touch the host: a device is given its interrupt line, clock and memory.
HOST = ("time", "socket", "asyncio", "os", "fcntl")
CHIPS = ("vmm_kvm.devices", "vmm_kvm.pci", "vmm_kvm.virtio")
# The protocol between a VM and a device process consists of sockets and descriptors.
BETWEEN_PROCESSES = ("vmm_kvm.virtio.vhost_user", ("os", "socket"))
# Threads of devices wait for eventfds.
DEVICE_THREADS = {("vmm_kvm.virtio.worker", "os"), ("vmm_kvm.virtio.ring_events", "os")}
# Outside the bindings, fcntl is for seals of memory, locks on files, and taps and vhost-net with
# ioctls of their own.
FCNTL = {
    *("vmm_kvm.memfd", "vmm_kvm.block.locks", "vmm_kvm.block.device"),
    *("vmm_kvm.net.bridge", "vmm_kvm.net.tap", "vmm_kvm.net.vhost", "vmm_kvm.snapshot.fds"),
}

MUTATIONS = (
    ("vmm_kvm.block.raw", "from vmm_kvm.virtio.queue import Virtqueue"),
    ("vmm_kvm.boot.elf", "from vmm_kvm.loop import EventLoop"),
    ("vmm_kvm.devices.uart16550", "from vmm_kvm.virtio.blk import VirtioBlk"),
    ("vmm_kvm.memory", "from vmm_kvm.kvm.system import Kvm"),
    ("vmm_kvm.kvm.vm", "from vmm_kvm.machine.machine import Machine"),
    ("vmd.rules.registry", "from vmd.parent.process import Parent"),
    ("vmd.config.parser", "from vmd.shared import log"),
    ("vmd.wire.channel", "import pyroute2"),
    ("vmd.shared.paths", "from vmd.parent.process import Parent"),
    ("vmd.parent.process", "from vmd.control.process import Control"),
    ("vmd.control.process", "from vmd.parent.process import Parent"),
    ("vmd.priv.process", "from vmd.local.process import Local"),
    ("vmd.local.process", "from vmd.priv.process import Priv"),
    ("vmd.vmm.process", "from vmd.zygote.process import serve"),
    ("vmd.zygote.process", "from vmd.vmm.process import Vmm"),
    ("vmd.zygote.warm.packing", "from vmd.vm.process import run"),
    ("vmd.vm.process", "from vmd.device.process import run"),
    ("vmd.device.process", "from vmd.vm.process import run"),
    ("vmctl.client", "from vmd.parent.process import Parent"),
    ("vmctl.daemon.status", "import pyroute2"),
)
"""Imports that the table forbids: a module, and a line that it must not have."""


def _told(found: list[Import]) -> list[str]:
    return [str(one) for one in found]


def test_every_module_has_a_layer() -> None:
    """The table covers every module of the three packages."""
    assert [name for name in FILES if layer_of(name) is None] == []


def test_no_import_is_forbidden() -> None:
    """The table has every edge that an import makes."""
    assert layers.forbidden(IMPORTS) == []


def test_no_entry_is_unused() -> None:
    """Each entry of the table is needed by an import."""
    assert layers.unused(IMPORTS) == []


@pytest.mark.parametrize(("module", "line"), MUTATIONS)
def test_forbidden_imports_are_found(module: str, line: str) -> None:
    """One forbidden import in a module is found, at its top or inside a function."""
    source = FILES[module].read_text()
    for added in (line, f"def _late() -> None:\n    {line}"):
        changed = f"{source}\n{added}\n"
        assert len(layers.forbidden(layers.imports_of(module, changed, FILES))) == 1


def test_an_unused_entry_is_found() -> None:
    """Without the one import that needs an entry, the entry is reported."""
    kept = [one for one in IMPORTS if one.importer != "vmd.priv.rtnetlink"]
    assert "vmd.priv -> pyroute2" in layers.unused(
        [one for one in kept if not (one.importer.startswith("vmd.priv") and one.is_foreign)]
    )


def test_folders_have_no_cycle() -> None:
    """No folder imports, by whatever detour, one that imports it."""
    graph: dict[str, set[str]] = {}
    for one in IMPORTS:
        if one.imported in FILES:
            source = layers.folder_of(one.importer, FILES)
            target = layers.folder_of(one.imported, FILES)
            if source != target:
                graph.setdefault(source, set()).add(target)
    assert layers.cycles(graph) == []


def test_modules_of_a_folder_have_no_cycle_without_a_reason() -> None:
    """Modules that import each other are those that the table of cycles names."""
    graph: dict[str, set[str]] = {}
    for one in IMPORTS:
        if one.imported in FILES and one.imported != one.importer:
            graph.setdefault(one.importer, set()).add(one.imported)
    assert layers.cycles(graph) == sorted(layers.CYCLES, key=sorted)


def test_codecs_are_loaded_where_they_are_needed() -> None:
    """A codec is imported inside a function, never at the top of a module of the hypervisor."""
    found = [one for one in IMPORTS if one.importer.startswith("vmm_kvm") and one.is_of(*CODECS)]
    assert found
    assert _told([one for one in found if one.is_top_level]) == []


def test_only_a_command_body_loads_the_hypervisor() -> None:
    """No other vmctl module imports one that loads the hypervisor, except inside a function."""
    wrong = [
        one
        for one in IMPORTS
        if one.importer.startswith("vmctl")
        and one.importer not in VMCTL_WITH_HYPERVISOR
        and one.is_of(*VMCTL_WITH_HYPERVISOR)
        and one.is_top_level
    ]
    assert _told(wrong) == []


@pytest.mark.parametrize("folder", CHIPS)
def test_devices_know_no_host(folder: str) -> None:
    """A device is given its interrupt line, clock and memory: it opens and waits for nothing."""
    between, allowed = BETWEEN_PROCESSES
    wrong = [
        one
        for one in IMPORTS
        if one.importer.startswith(f"{folder}.")
        and one.is_of(*HOST)
        and not (one.importer.startswith(f"{between}.") and one.is_of(*allowed))
        and (one.importer, one.imported) not in DEVICE_THREADS
    ]
    assert _told(wrong) == []


def test_only_the_bindings_talk_to_the_kernel() -> None:
    """Ioctls are called by vmm_kvm.kvm alone; nothing else in the hypervisor imports fcntl."""
    wrong = [
        one
        for one in IMPORTS
        if one.importer.startswith("vmm_kvm.")
        and not one.importer.startswith("vmm_kvm.kvm.")
        and one.is_of("fcntl")
        and one.importer not in FCNTL
    ]
    assert _told(wrong) == []


def test_pure_modules_touch_nothing() -> None:
    """Modules that only decide import neither clock, nor thread, nor system."""
    wrong = [
        one
        for one in IMPORTS
        if any(one.importer == name or one.importer.startswith(f"{name}.") for name in PURE)
        and one.imported.split(".")[0] in IMPURE
        and not (one.importer in PURE_WITH_LOCK and one.imported == "threading")
    ]
    assert _told(wrong) == []


def test_pure_modules_exist() -> None:
    """Each name in the list of pure modules is a module or folder."""
    assert [name for name in PURE if name not in FILES] == []


def test_the_page_has_the_table() -> None:
    """docs/architecture.md has the current table of layers, by scripts/structure.py --write."""
    page = (layers.ROOT / layers.EXPLAINED).read_text()
    assert structure.documented(page, structure.table(FILES)) == page


def test_the_report_names_every_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script prints a line for each folder, and no cycle between folders."""
    monkeypatch.setattr(sys, "argv", ["structure.py"])
    assert structure.main() == 0
    lines = capsys.readouterr().out.splitlines()
    folders = {layers.folder_of(name, FILES) for name in FILES}
    assert {line.split()[0] for line in lines[1 : len(folders) + 1]} == folders
    assert not any(line.startswith("cycle of folders") for line in lines)


def test_there_is_one_assembly_of_a_vm() -> None:
    """Only the table of `vmm_kvm.primitives` has KVM make a VM or a vCPU."""
    makers = {
        name for name, path in FILES.items() if re.search(r"\.create_(vm|vcpu)\(", path.read_text())
    }
    assert makers == {"vmm_kvm.vm_table"}


def test_the_c_library_is_loaded_once() -> None:
    """Only `vmm_kvm.libc` loads the C library; libnftables is another one."""
    loaders = {name for name, path in FILES.items() if "CDLL(" in path.read_text()}
    assert loaders == {"vmm_kvm.libc", "vmd.priv.nftables"}
