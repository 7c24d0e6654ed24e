"""The layers of the tree as data: each folder or module, and its allowed imports.

`LAYERS` is the one table. `tests/unit/test_architecture.py` compares it with the imports, and
`scripts/structure.py` prints it, also into docs/architecture.md.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vmm_kvm", "vmd", "vmctl", "vmm_agent", "vmm_pytest", "vmm_fleet")

LAYERS: Mapping[str, tuple[str, ...]] = {
    "vmm_kvm": (),
    "vmm_kvm.errors": (),
    "vmm_kvm.bits": (),
    "vmm_kvm.record": (),
    "vmm_kvm.state": ("vmm_kvm.errors", "vmm_kvm.record"),
    "vmm_kvm.irq": (),
    "vmm_kvm.clock": (),
    "vmm_kvm.text": (),
    "vmm_kvm.absolute": (),
    "vmm_kvm.boot_device": (),
    "vmm_kvm.log": ("vmm_kvm.text",),
    "vmm_kvm.scatter": ("vmm_kvm.libc",),
    "vmm_kvm.limits": ("vmm_kvm.bits",),
    "vmm_kvm.libc": ("vmm_kvm.bits",),
    "vmm_kvm.memfd": (),
    "vmm_kvm.new_file": (),
    "vmm_kvm.scratch": (),
    "vmm_kvm.standard_streams": (),
    "vmm_kvm.version": (),
    "vmm_kvm.swtpm": ("vmm_kvm.errors",),
    "vmm_kvm.listening": ("vmm_kvm.errors",),
    "vmm_kvm.accepting": ("vmm_kvm.log",),
    "vmm_kvm.loop": ("vmm_kvm.clock",),
    "vmm_kvm.bus": ("vmm_kvm.errors", "vmm_kvm.bits"),
    "vmm_kvm.write_log": ("vmm_kvm.bits", "vmm_kvm.memfd"),
    "vmm_kvm.memory": (
        "vmm_kvm.errors",
        "vmm_kvm.bits",
        "vmm_kvm.libc",
        "vmm_kvm.memfd",
        "vmm_kvm.write_log",
    ),
    "vmm_kvm.vm_params": (
        "vmm_kvm.errors",
        "vmm_kvm.bits",
        "vmm_kvm.limits",
        "vmm_kvm.record",
    ),
    "vmm_kvm.kvm": ("vmm_kvm.errors", "vmm_kvm.bits", "vmm_kvm.log", "vmm_kvm.libc"),
    "vmm_kvm.block": (
        "vmm_kvm.errors",
        "vmm_kvm.bits",
        "vmm_kvm.log",
        "vmm_kvm.scatter",
        "vmm_kvm.libc",
    ),
    "vmm_kvm.block.qcow2": (
        "vmm_kvm.errors",
        "vmm_kvm.bits",
        "vmm_kvm.log",
        "vmm_kvm.scatter",
        "vmm_kvm.block",
        "zstandard",
    ),
    "vmm_kvm.images": (
        "vmm_kvm.errors",
        "vmm_kvm.bits",
        "vmm_kvm.block",
        "vmm_kvm.block.qcow2",
        "vmm_kvm.new_file",
    ),
    "vmm_kvm.boot": (
        "vmm_kvm.errors",
        "vmm_kvm.bits",
        "vmm_kvm.clock",
        "vmm_kvm.log",
        "vmm_kvm.limits",
        "vmm_kvm.memory",
        "vmm_kvm.block",
        "vmm_kvm.images",
        "vmm_kvm.new_file",
        "lz4",
        "zstandard",
    ),
    "vmm_kvm.fs": ("vmm_kvm.bits", "vmm_kvm.libc"),
    "vmm_kvm.arch": (),
    "vmm_kvm.arch.x86": (
        "vmm_kvm.boot_device",
        "vmm_kvm.errors",
        "vmm_kvm.record",
        "vmm_kvm.state",
        "vmm_kvm.bits",
        "vmm_kvm.limits",
        "vmm_kvm.bus",
        "vmm_kvm.memory",
        "vmm_kvm.kvm",
        "vmm_kvm.boot",
        "vmm_kvm.arch.x86.layout",
    ),
    "vmm_kvm.arch.x86.layout": ("vmm_kvm.bits",),
    "vmm_kvm.net": ("vmm_kvm.errors", "vmm_kvm.limits"),
    "vmm_kvm.scsi": ("vmm_kvm.errors", "vmm_kvm.state"),
    "vmm_kvm.devices": (
        "vmm_kvm.errors",
        "vmm_kvm.state",
        "vmm_kvm.bits",
        "vmm_kvm.irq",
        "vmm_kvm.clock",
        "vmm_kvm.log",
        "vmm_kvm.memory",
        "vmm_kvm.arch.x86.layout",
    ),
    "vmm_kvm.pci": (
        "vmm_kvm.clock",
        "vmm_kvm.errors",
        "vmm_kvm.state",
        "vmm_kvm.bits",
        "vmm_kvm.irq",
        "vmm_kvm.log",
        "vmm_kvm.bus",
        "vmm_kvm.arch.x86.layout",
    ),
    "vmm_kvm.virtio": (
        "vmm_kvm.errors",
        "vmm_kvm.state",
        "vmm_kvm.bits",
        "vmm_kvm.irq",
        "vmm_kvm.clock",
        "vmm_kvm.log",
        "vmm_kvm.scatter",
        "vmm_kvm.limits",
        "vmm_kvm.memory",
        "vmm_kvm.block",
        "vmm_kvm.fs",
        "vmm_kvm.net",
        "vmm_kvm.scsi",
        "vmm_kvm.pci",
        "vmm_kvm.write_log",
    ),
    "vmm_kvm.virtio.vhost_user": (
        "vmm_kvm.text",
        "vmm_kvm.errors",
        "vmm_kvm.state",
        "vmm_kvm.bits",
        "vmm_kvm.log",
        "vmm_kvm.limits",
        "vmm_kvm.listening",
        "vmm_kvm.accepting",
        "vmm_kvm.loop",
        "vmm_kvm.memory",
        "vmm_kvm.virtio",
        "vmm_kvm.write_log",
    ),
    "vmm_kvm.snapshot": (
        "vmm_kvm.errors",
        "vmm_kvm.new_file",
        "vmm_kvm.bits",
        "vmm_kvm.limits",
        "vmm_kvm.state",
        "vmm_kvm.text",
        "vmm_kvm.kvm",
    ),
    "vmm_kvm.vm_table": (
        "vmm_kvm.errors",
        "vmm_kvm.vm_params",
        "vmm_kvm.kvm",
        "vmm_kvm.arch.x86",
        "vmm_kvm.arch.x86.layout",
    ),
    "vmm_kvm.holding": ("vmm_kvm.errors", "vmm_kvm.vm_table"),
    "vmm_kvm.primitives": (
        "vmm_kvm.errors",
        "vmm_kvm.limits",
        "vmm_kvm.memory",
        "vmm_kvm.vm_params",
        "vmm_kvm.kvm",
        "vmm_kvm.arch.x86",
        "vmm_kvm.vm_table",
    ),
    "vmm_kvm.machine": (
        "vmm_kvm.boot_device",
        "vmm_kvm.errors",
        "vmm_kvm.record",
        "vmm_kvm.irq",
        "vmm_kvm.state",
        "vmm_kvm.bits",
        "vmm_kvm.clock",
        "vmm_kvm.log",
        "vmm_kvm.limits",
        "vmm_kvm.bus",
        "vmm_kvm.memory",
        "vmm_kvm.vm_params",
        "vmm_kvm.kvm",
        "vmm_kvm.boot",
        "vmm_kvm.arch.x86",
        "vmm_kvm.arch.x86.layout",
        "vmm_kvm.net",
        "vmm_kvm.devices",
        "vmm_kvm.pci",
        "vmm_kvm.virtio",
        "vmm_kvm.virtio.vhost_user",
        "vmm_kvm.primitives",
        "vmm_kvm.write_log",
        "vmm_kvm.holding",
    ),
    "vmm_kvm.gdb": (
        "vmm_kvm.errors",
        "vmm_kvm.bits",
        "vmm_kvm.listening",
        "vmm_kvm.loop",
        "vmm_kvm.kvm",
        "vmm_kvm.machine",
    ),
    "vmm_kvm.commands": (
        "vmm_kvm.limits",
        "vmm_kvm.standard_streams",
        "vmm_kvm.block",
        "vmm_kvm.images",
        "vmm_kvm.net",
        "vmm_kvm.virtio",
        "vmm_kvm.virtio.vhost_user",
    ),
    "vmd": (),
    "vmd.config": ("vmm_kvm.boot_device", "vmm_kvm.text", "vmm_kvm.limits", "vmm_kvm.net"),
    "vmd.wire": (
        "vmm_kvm.boot_device",
        "vmm_kvm.errors",
        "vmm_kvm.clock",
        "vmm_kvm.limits",
        "vmd.config",
        "msgspec",
    ),
    "vmd.rules": ("vmm_kvm.errors", "vmm_kvm.limits", "vmm_kvm.net", "vmd.config", "vmd.wire"),
    "vmd.confine": ("vmm_kvm.libc", "vmm_kvm.memfd", "vmm_kvm.net"),
    "vmd.shared": (
        "vmm_kvm.errors",
        "vmm_kvm.clock",
        "vmm_kvm.text",
        "vmm_kvm.log",
        "vmm_kvm.scatter",
        "vmm_kvm.libc",
        "vmm_kvm.memfd",
        "vmm_kvm.loop",
        "vmm_kvm.block",
        "vmm_kvm.images",
        "vmm_kvm.boot",
        "vmd.config",
        "vmd.wire",
        "vmd.confine",
    ),
    "vmd.unusable": (
        "vmm_kvm.errors",
        "vmm_kvm.block",
        "vmm_kvm.images",
        "vmm_kvm.boot",
        "vmm_kvm.arch.x86",
        "vmd.config",
        "vmd.shared",
    ),
    "vmd.opener": ("vmm_kvm.log", "vmd.wire", "vmd.shared"),
    "vmd.parent": (
        "vmm_kvm.boot_device",
        "vmm_kvm.errors",
        "vmm_kvm.clock",
        "vmm_kvm.log",
        "vmm_kvm.limits",
        "vmm_kvm.libc",
        "vmm_kvm.listening",
        "vmm_kvm.memfd",
        "vmm_kvm.new_file",
        "vmm_kvm.loop",
        "vmm_kvm.scratch",
        "vmm_kvm.kvm",
        "vmm_kvm.block",
        "vmm_kvm.boot",
        "vmd.config",
        "vmd.wire",
        "vmd.rules",
        "vmd.confine",
        "vmd.shared",
        "msgspec",
    ),
    "vmd.control": ("vmm_kvm.accepting", "vmm_kvm.log", "vmd.wire", "vmd.shared"),
    "vmd.priv": (
        "vmm_kvm.log",
        "vmm_kvm.net",
        "vmd.config",
        "vmd.wire",
        "vmd.rules",
        "vmd.shared",
        "pyroute2",
    ),
    "vmd.local": (
        "vmm_kvm.clock",
        "vmm_kvm.log",
        "vmm_kvm.loop",
        "vmm_kvm.net",
        "vmd.wire",
        "vmd.shared",
    ),
    "vmd.agentx": (
        "vmm_kvm.clock",
        "vmm_kvm.log",
        "vmm_kvm.loop",
        "vmd.wire",
        "vmd.shared",
    ),
    "vmd.tpm": (
        "vmm_kvm.clock",
        "vmm_kvm.log",
        "vmm_kvm.loop",
        "vmm_kvm.memfd",
        "vmm_kvm.swtpm",
        "vmm_kvm.text",
        "vmd.wire",
        "vmd.confine",
        "vmd.shared",
    ),
    "vmd.vmm": ("vmm_kvm.clock", "vmm_kvm.log", "vmm_kvm.loop", "vmd.wire", "vmd.shared"),
    "vmd.zygote": ("vmm_kvm.log", "vmd.wire", "vmd.confine", "vmd.shared"),
    "vmd.zygote.warm": (
        "vmm_kvm.bits",
        "vmm_kvm.log",
        "vmm_kvm.libc",
        "vmm_kvm.memfd",
        "vmm_kvm.kvm",
        "vmm_kvm.arch.x86.layout",
        "vmd.wire",
        "vmd.confine",
        "vmd.shared",
    ),
    "vmd.vm": (
        "vmm_kvm.pci",
        "vmm_kvm.errors",
        "vmm_kvm.bits",
        "vmm_kvm.clock",
        "vmm_kvm.libc",
        "vmm_kvm.log",
        "vmm_kvm.memfd",
        "vmm_kvm.loop",
        "vmm_kvm.kvm",
        "vmm_kvm.block",
        "vmm_kvm.images",
        "vmm_kvm.boot",
        "vmm_kvm.arch.x86",
        "vmm_kvm.net",
        "vmm_kvm.virtio",
        "vmm_kvm.virtio.vhost_user",
        "vmm_kvm.primitives",
        "vmm_kvm.gdb",
        "vmm_kvm.machine",
        "vmm_kvm.memory",
        "vmm_kvm.snapshot",
        "vmm_kvm.swtpm",
        "vmd.config",
        "vmd.wire",
        "vmd.confine",
        "vmd.shared",
    ),
    "vmd.device": (
        "vmm_kvm.errors",
        "vmm_kvm.loop",
        "vmm_kvm.log",
        "vmm_kvm.block",
        "vmm_kvm.fs",
        "vmm_kvm.images",
        "vmm_kvm.net",
        "vmm_kvm.snapshot",
        "vmm_kvm.virtio",
        "vmm_kvm.virtio.vhost_user",
        "vmd.config",
        "vmd.wire",
        "vmd.confine",
        "vmd.shared",
    ),
    "vmd.options": (),
    "vmd.fresh": ("vmd.confine", "vmd.shared", "vmd.zygote.warm"),
    "vmd.children": (
        "vmd.fresh",
        "vmm_kvm.version",
        "vmm_kvm.log",
        "vmm_kvm.loop",
        "vmm_kvm.kvm",
        "vmd.wire",
        "vmd.confine",
        "vmd.shared",
        "vmd.control",
        "vmd.priv",
        "vmd.local",
        "vmd.agentx",
        "vmd.tpm",
        "vmd.vmm",
        "vmd.zygote",
        "vmd.zygote.warm",
        "vmd.opener",
        "vmd.vm",
        "vmd.device",
    ),
    "vmd.daemon": (
        "vmm_kvm.absolute",
        "vmm_kvm.clock",
        "vmm_kvm.log",
        "vmm_kvm.loop",
        "vmm_kvm.kvm",
        "vmd.config",
        "vmd.rules",
        "vmd.confine",
        "vmd.shared",
        "vmd.parent",
        "vmd.zygote.warm",
        "vmd.options",
        "vmd.children",
    ),
    "vmd.__main__": (
        "vmm_kvm.text",
        "vmm_kvm.standard_streams",
        "vmm_kvm.version",
        "vmd.config",
        "vmd.rules",
        "vmd.confine",
        "vmd.shared",
        "vmd.options",
        "vmd.unusable",
        "vmd.daemon",
    ),
    "vmctl": ("vmm_kvm.absolute", "vmm_kvm.text", "vmm_kvm.limits", "vmm_kvm.record", "vmd.shared"),
    "vmctl.values": ("vmm_kvm.errors", "vmm_kvm.limits", "vmm_kvm.record", "vmd.config", "vmctl"),
    "vmctl.screen": ("vmm_kvm.text",),
    "vmctl.screen.progress": ("rich",),
    "vmctl.line": ("vmm_kvm.text", "vmm_kvm.log", "vmm_kvm.version", "vmctl", "typer"),
    "vmctl.__main__": ("vmm_kvm.standard_streams", "vmctl.line"),
    "vmctl.images": (
        "vmm_kvm.absolute",
        "vmm_kvm.errors",
        "vmm_kvm.text",
        "vmm_kvm.log",
        "vmm_kvm.new_file",
        "vmm_kvm.version",
        "vmm_kvm.block",
        "vmm_kvm.block.qcow2",
        "vmm_kvm.images",
        "vmd.config",
        "vmd.shared",
        "vmm_agent",
        "vmctl",
        "vmctl.values",
        "vmctl.screen",
        "vmctl.screen.progress",
        "vmctl.line",
        "vmctl.guest",
        "msgspec",
    ),
    "vmctl.guest": (
        "vmm_kvm.text",
        "vmm_kvm.new_file",
        "vmm_kvm.standard_streams",
        "vmctl",
        "vmctl.screen",
    ),
    "vmctl.daemon": (
        "vmm_kvm.absolute",
        "vmm_kvm.errors",
        "vmm_kvm.record",
        "vmm_kvm.text",
        "vmm_kvm.boot_device",
        "vmm_kvm.limits",
        "vmm_kvm.new_file",
        "vmm_kvm.standard_streams",
        "vmm_kvm.block",
        "vmm_kvm.images",
        "vmm_kvm.boot",
        "vmm_kvm.snapshot",
        "vmd.config",
        "vmctl",
        "vmctl.values",
        "vmctl.screen",
        "vmctl.images",
        "vmctl.guest",
    ),
    "vmctl.foreground": (
        "vmm_kvm.absolute",
        "vmm_kvm.errors",
        "vmm_kvm.bits",
        "vmm_kvm.clock",
        "vmm_kvm.text",
        "vmm_kvm.boot_device",
        "vmm_kvm.log",
        "vmm_kvm.limits",
        "vmm_kvm.memfd",
        "vmm_kvm.scratch",
        "vmm_kvm.standard_streams",
        "vmm_kvm.swtpm",
        "vmm_kvm.listening",
        "vmm_kvm.accepting",
        "vmm_kvm.loop",
        "vmm_kvm.memory",
        "vmm_kvm.kvm",
        "vmm_kvm.block",
        "vmm_kvm.images",
        "vmm_kvm.boot",
        "vmm_kvm.fs",
        "vmm_kvm.arch.x86",
        "vmm_kvm.net",
        "vmm_kvm.pci",
        "vmm_kvm.virtio",
        "vmm_kvm.virtio.vhost_user",
        "vmm_kvm.snapshot",
        "vmm_kvm.primitives",
        "vmm_kvm.machine",
        "vmm_kvm.gdb",
        "vmd.config",
        "vmd.confine",
        "vmd.device",
        "vmctl",
        "vmctl.values",
        "vmctl.screen",
        "vmctl.images",
        "vmctl.guest",
        "zstandard",
        "vmm_agent",
    ),
    "vmctl.doctor": (
        "vmm_kvm.errors",
        "vmm_kvm.text",
        "vmm_kvm.kvm",
        "vmm_kvm.boot",
        "vmm_kvm.primitives",
        "vmm_kvm.machine",
        "vmd.config",
        "vmd.shared",
        "vmctl",
        "vmctl.screen",
    ),
    "vmctl.web": (
        "vmm_kvm.version",
        "vmd.wire",
        "vmd.shared",
        "vmctl",
        "vmctl.daemon",
        "starlette",
        "msgspec",
        "uvicorn",
    ),
    "vmm_agent": (),
    "vmm_pytest": (
        "vmm_kvm.standard_streams",
        "vmm_kvm.text",
        "vmm_kvm.libc",
        "vmd.shared",
        "vmctl",
        "vmctl.guest",
        "pytest",
        "pluggy",
    ),
    "vmm_fleet": (
        "vmm_kvm.errors",
        "vmm_kvm.snapshot",
        "vmd.config",
        "vmd.shared",
        "vmctl",
        "vmctl.images",
        "vmctl.guest",
        "vmm_pytest",
        "distributed",
    ),
}
"""Allowed imports of each folder or module, besides itself and the standard library.

A module belongs to the longest name that contains it. Names without a dot at the end of a list are
third-party packages.
"""

CYCLES: Mapping[frozenset[str], str] = {
    frozenset({"vmm_kvm.kvm.system", "vmm_kvm.kvm.vm"}): (
        "a Kvm makes Vms, and a Vm names the class of its Kvm, for types alone"
    ),
}
"""Modules of one folder that import each other, and the reason."""

EXPLAINED = "docs/architecture.md"


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement: its module, the imported one, its line, whether at the module's top."""

    importer: str
    imported: str
    line: int
    is_top_level: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"

    def is_of(self, *prefixes: str) -> bool:
        """Tell whether the imported module is one of these or inside one of them."""
        return any(_lies_in(self.imported, prefix) for prefix in prefixes)

    @property
    def is_foreign(self) -> bool:
        """Whether it is neither the standard library's nor of this tree."""
        top = self.imported.split(".")[0]
        return top not in PACKAGES and top not in sys.stdlib_module_names

    @property
    def is_ours(self) -> bool:
        """Whether it is of this tree."""
        return self.imported.split(".")[0] in PACKAGES


def _lies_in(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def module_files(root: Path = ROOT) -> dict[str, Path]:
    """Return the file of each module of the five packages, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(importer: str, source: str, modules: Iterable[str]) -> Iterator[Import]:
    """Yield every import of a module's source; `from package import module` names the module.

    Raises:
        ValueError: an import is relative.
    """
    known = frozenset(modules)
    tree = ast.parse(source)
    top_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise ValueError(f"{importer}:{node.lineno}: a relative import")
            names = [
                full if (full := f"{node.module}.{alias.name}") in known else node.module
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            yield Import(importer, name, node.lineno, id(node) in top_level)


def all_imports(root: Path = ROOT) -> tuple[Import, ...]:
    """Return every import of the tree."""
    files = module_files(root)
    return tuple(
        found for name, path in files.items() for found in imports_of(name, path.read_text(), files)
    )


def layer_of(name: str, layers: Mapping[str, tuple[str, ...]] = LAYERS) -> str | None:
    """Return the table's entry for a module or a third-party package."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        prefix = ".".join(parts[:count])
        if prefix in layers:
            return prefix
    return None if parts[0] in PACKAGES else parts[0]


def folder_of(name: str, files: Mapping[str, Path], root: Path = ROOT) -> str:
    """Return the folder of a module, as a dotted name.

    A module directly in its package, such as `vmm_kvm.bus`, stands for itself.
    """
    folder = ".".join(files[name].relative_to(root).parent.parts)
    return name if folder in PACKAGES else folder


def edges(imports: Iterable[Import]) -> dict[tuple[str, str], list[Import]]:
    """Return the imports from one layer to another, by both; a module without layer is its own."""
    found: dict[tuple[str, str], list[Import]] = {}
    for one in imports:
        if not (one.is_ours or one.is_foreign):
            continue
        source = layer_of(one.importer) or one.importer
        target = layer_of(one.imported) or one.imported
        if source != target:
            found.setdefault((source, target), []).append(one)
    return found


def forbidden(imports: Iterable[Import]) -> list[str]:
    """Return the imports that the table does not allow, a line each."""
    return [
        f"{one}: {source} may not import {target}"
        for (source, target), ones in edges(imports).items()
        for one in ones
        if target not in LAYERS.get(source, ())
    ]


def unused(imports: Iterable[Import]) -> list[str]:
    """Return the allowed edges that no import needs, a line each."""
    found = edges(imports)
    return [
        f"{source} -> {target}"
        for source, targets in LAYERS.items()
        for target in targets
        if (source, target) not in found
    ]


def cycles(graph: Mapping[str, Iterable[str]]) -> list[frozenset[str]]:
    """Return the sets of names that all reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in graph.get(waiting.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
        reached[start] = seen
    found = {
        frozenset({start, *(other for other in seen if start in reached.get(other, ()))})
        for start, seen in reached.items()
        if start in seen
    }
    return sorted(found, key=sorted)
