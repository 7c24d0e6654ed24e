"""The layer rules: which package, process and module may import which."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("vmm_kvm", "vmd", "vmctl")

# Codecs that a compressed kernel or disk cluster needs; loaded there and nowhere else.
CODECS = {"zstandard", "lz4"}
VMCTL_MAY_IMPORT = (
    "vmd.messages",
    "vmd.channel",
    "vmd.config.disks",
    "vmd.config.sizes",
    "vmd.paths",
    "vmm_kvm.block",
    "vmm_kvm.errors",
    "vmm_kvm.net",
    "vmm_kvm.standard_streams",
)
# Commands that run a VM in this very process, without a daemon.
VMCTL_WITH_HYPERVISOR = {"vmctl.run", "vmctl.nics", "vmctl.disks", "vmctl.doctor", "vmctl.stdio"}
VMCTL_LIBRARIES = {"typer", "rich", "msgspec"}
VMD_LIBRARIES = {"msgspec", "pyroute2"}

# Pure modules decide; what they decide about, time included, is handed to them.
PURE = (
    *("vmm_kvm.bits", "vmm_kvm.irq", "vmm_kvm.bus", "vmm_kvm.boot.e820"),
    *("vmm_kvm.boot.layout", "vmm_kvm.boot.entry", "vmd.config.sizes", "vmd.lifecycle"),
    *("vmm_kvm.net.ethernet", "vmm_kvm.net.abi"),
    *("vmm_kvm.scsi.spc", "vmm_kvm.scsi.mmc", "vmm_kvm.scsi.cdrom"),
    *("vmd.registry", "vmd.policy", "vmd.addressing"),
    *("vmd.config.model", "vmd.config.lexer", "vmd.config.grammar", "vmd.config.values"),
    *("vmd.config.interfaces", "vmd.config.vms", "vmd.config.parser", "vmd.config.check"),
    "vmd.config.text",
)
IMPURE = {"os", "socket", "time", "asyncio", "logging", "threading"}
# Locks on files are fcntl's as well.
FCNTL_FOR_LOCKS = {("vmm_kvm.block.locks", "fcntl")}
# So are seals of memory.
FCNTL_FOR_SEALS = {("vmm_kvm.memfd", "fcntl")}
# Taps and vhost-net are devices of the host with ioctls of their own.
FCNTL_FOR_NETWORKS = {(f"vmm_kvm.net.{name}", "fcntl") for name in ("bridge", "tap", "vhost")}
# A bus holds one lock per device, which its docstring describes.
PURE_WITH_LOCK = {"vmm_kvm.bus"}

# The protocol between a VM and a device process is made of sockets and descriptors.
BETWEEN_PROCESSES = "vmm_kvm.virtio.vhost_user."
# Threads of devices wait for eventfds.
DEVICE_THREADS = {("vmm_kvm.virtio.worker", "os"), ("vmm_kvm.virtio.ring_events", "os")}


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement: who imports what, where, and whether at the top of the module."""

    importer: str
    imported: str
    line: int
    is_top_level: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"

    def is_of(self, *prefixes: str) -> bool:
        """Tell whether what is imported is one of these modules or inside one of them."""
        return any(
            self.imported == prefix or self.imported.startswith(f"{prefix}.") for prefix in prefixes
        )


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports_of(path: Path) -> Iterator[Import]:
    """Yield every import of a file; `from package import module` names the module."""
    importer = _module_name(path)
    tree = ast.parse(path.read_text())
    top_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}:{node.lineno}: a relative import"
            assert node.module is not None
            names = [
                full if _is_module(full := f"{node.module}.{alias.name}") else node.module
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            yield Import(importer, name, node.lineno, id(node) in top_level)


IMPORTS = tuple(
    found
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    for found in imports_of(path)
)


def _within(package: str) -> list[Import]:
    return [one for one in IMPORTS if one.importer.split(".")[0] == package]


def _foreign(package: str) -> list[Import]:
    """Imports of a package that are neither its own nor the standard library's."""
    return [
        one
        for one in _within(package)
        if not one.is_of(package) and one.imported.split(".")[0] not in sys.stdlib_module_names
    ]


def _told(found: list[Import]) -> list[str]:
    return [str(one) for one in found]


def test_the_hypervisor_imports_the_standard_library_only() -> None:
    """vmm_kvm needs no package, save the codecs, which it loads only where they are needed."""
    assert (
        _told([one for one in _foreign("vmm_kvm") if not one.is_of(*CODECS) or one.is_top_level])
        == []
    )


def test_the_daemon_imports_the_hypervisor_and_its_libraries_only() -> None:
    """Vmd knows vmm_kvm, never vmctl."""
    assert _told([one for one in _foreign("vmd") if not one.is_of("vmm_kvm", *VMD_LIBRARIES)]) == []


def test_the_command_imports_messages_only() -> None:
    """Vmctl speaks with the daemon; only commands that run a VM themselves load the hypervisor."""
    wrong = [
        one
        for one in _foreign("vmctl")
        if not one.is_of(*VMCTL_MAY_IMPORT, *VMCTL_LIBRARIES)
        and not (one.importer in VMCTL_WITH_HYPERVISOR and one.is_of("vmm_kvm"))
    ]
    assert _told(wrong) == []


def test_only_a_command_body_loads_the_hypervisor() -> None:
    """No other vmctl module imports one that loads the hypervisor, except inside a function."""
    wrong = [
        one
        for one in _within("vmctl")
        if one.importer not in VMCTL_WITH_HYPERVISOR
        and one.is_of(*VMCTL_WITH_HYPERVISOR)
        and one.is_top_level
    ]
    assert _told(wrong) == []


@pytest.mark.parametrize("package", ["devices", "pci", "virtio"])
def test_devices_know_no_kvm_and_no_host(package: str) -> None:
    """A device is handed its interrupt line, clock and memory: it opens and waits for nothing."""
    forbidden = ("vmm_kvm.kvm", "vmm_kvm.machine", "vmm_kvm.runner", "time", "socket", "asyncio")
    wrong = [
        one
        for one in IMPORTS
        if one.importer.startswith(f"vmm_kvm.{package}.")
        and one.is_of(*forbidden, "os", "fcntl")
        and not (one.importer.startswith(BETWEEN_PROCESSES) and one.is_of("os", "socket"))
        and (one.importer, one.imported) not in DEVICE_THREADS
    ]
    assert _told(wrong) == []


def test_only_the_bindings_talk_to_the_kernel() -> None:
    """Ioctls are called by vmm_kvm.kvm alone; nothing else in the hypervisor imports its way."""
    wrong = [
        one
        for one in _within("vmm_kvm")
        if not one.importer.startswith("vmm_kvm.kvm.")
        and one.is_of("fcntl", "vmm_kvm.kvm.ioctl", "vmm_kvm.kvm.abi")
        and (one.importer, one.imported)
        not in FCNTL_FOR_LOCKS | FCNTL_FOR_SEALS | FCNTL_FOR_NETWORKS
    ]
    assert _told(wrong) == []


def test_wiring_is_imported_by_nobody_below_it() -> None:
    """Only whoever runs a VM imports machine and runner; no part of a machine does."""
    wrong = [
        one
        for one in _within("vmm_kvm")
        if one.is_of("vmm_kvm.machine") and one.importer != "vmm_kvm.primitives"
    ]
    assert _told(wrong) == []


def test_processes_do_not_import_each_other() -> None:
    """A process of the daemon imports no other; control imports no hypervisor at all."""
    processes = [one for one in IMPORTS if one.importer.startswith("vmd.procs.")]
    assert _told([one for one in processes if one.is_of("vmd.procs")]) == []
    assert (
        _told(
            [
                one
                for one in processes
                if one.importer == "vmd.procs.control" and one.is_of("vmm_kvm")
            ]
        )
        == []
    )
    assert (
        _told(
            [
                one
                for one in processes
                if one.is_of("vmm_kvm.machine") and one.importer != "vmd.procs.vm"
            ]
        )
        == []
    )


def test_pure_modules_touch_nothing() -> None:
    """Modules that only decide import neither clock, nor thread, nor system."""
    wrong = [
        one
        for one in IMPORTS
        if one.importer in PURE
        and one.imported.split(".")[0] in IMPURE
        and not (one.importer in PURE_WITH_LOCK and one.imported == "threading")
    ]
    assert _told(wrong) == []


def test_the_rules_see_imports_inside_functions() -> None:
    """The walk finds an import in a function body and tells it from one at the top."""
    import wave  # noqa: F401, PLC0415 - what the walk has to find

    found = list(imports_of(Path(__file__)))
    assert [one.is_top_level for one in found if one.imported == "wave"] == [False]
    assert [one.is_top_level for one in found if one.imported == "ast"] == [True]
