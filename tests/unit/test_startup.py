"""What a plain `vmctl run` and `vmctl start` load and define: a start pays for all of it.

The bounds are for the modules of this project. One more module costs a start 0.1 ms on a processor
of 3 GHz, a NamedTuple or an enumeration the same, a plain class or a Record a tenth.
`bench/boot --beside TREE` measures the whole.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_BEFORE = "vmctl.__main__, vmm_kvm.standard_streams, vmctl.line.cli"

_NOT_FOR_RUN = {
    "vmctl.screen.console",  # the escapes and raw mode of a terminal
    "vmctl.foreground.disks",
    "vmctl.foreground.gdb_socket",
    "vmctl.foreground.nics",
    "vmctl.foreground.restoring",
    "vmctl.foreground.vsock",
    "vmm_kvm.arch.x86.kernels",  # all but Linux's bzImage
    "vmm_kvm.block",
    "vmm_kvm.boot.nvram",
    "vmm_kvm.gdb",
    "vmm_kvm.machine.dirty",
    "vmm_kvm.machine.state",
    "vmm_kvm.net",
    "vmm_kvm.snapshot",
    *("argparse", "asyncio", "dataclasses", "inspect", "json", "logging", "msgspec", "pathlib"),
    *("rich", "subprocess", "typer", "tty"),
}
_NOT_FOR_START = {
    "vmctl.daemon.attach",
    "vmctl.images.store",  # of disks
    "vmctl.daemon.save",
    "vmctl.daemon.snapshots",
    "vmctl.daemon.wait",
    "vmd.config.disks",
    "vmd.wire",
    "vmm_kvm.block",
    "vmm_kvm.kvm",
    *("argparse", "asyncio", "ctypes", "dataclasses", "inspect", "logging", "msgspec", "pathlib"),
    *("rich", "subprocess", "typer", "typing"),
}


def _inspect(module: str, question: str) -> list[str]:
    """Return the words that `question` prints after the modules of a command were loaded."""
    program = (
        "import builtins, sys\n"
        "texts = []\n"
        "original = builtins.compile\n"
        "def compile(source, *rest, **named):\n"
        "    if isinstance(source, str): texts.append(source)\n"
        "    return original(source, *rest, **named)\n"
        "builtins.compile = compile\n"
        f"import {_BEFORE}, {module}\n"
        "own = {name: module for name, module in sys.modules.items()"
        " if name.split('.')[0] in {'vmctl', 'vmd', 'vmm_kvm'}}\n"
        "classes = {value for module in own.values() for value in vars(module).values()"
        " if isinstance(value, type) and value.__module__ in own}\n"
        f"{question}"
    )
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("module", "most", "without"),
    [("vmctl.foreground.run", 122, _NOT_FOR_RUN), ("vmctl.daemon.start", 32, _NOT_FOR_START)],
)
def test_a_plain_start_loads_no_module_in_vain(module: str, most: int, without: set[str]) -> None:
    """Modules for options that were not given are loaded where the option is used."""
    loaded = set(_inspect(module, "print(*sys.modules)"))
    assert module in loaded
    assert without & loaded == set()
    own = {name for name in loaded if name.split(".")[0] in {"vmctl", "vmd", "vmm_kvm"}}
    assert len(own) <= most, f"loaded: {sorted(own)}"


@pytest.mark.parametrize(
    ("module", "most"), [("vmctl.foreground.run", 62), ("vmctl.daemon.start", 3)]
)
def test_a_plain_start_defines_few_classes_that_are_dear(module: str, most: int) -> None:
    """NamedTuples and enumerations cost ten times what a Record or a class of numbers costs."""
    question = (
        "import enum\n"
        "print(*{c.__qualname__ for c in classes"
        " if isinstance(c, enum.EnumMeta) or issubclass(c, tuple)})"
    )
    found = _inspect(module, question)
    assert 0 < len(found) <= most, f"defined: {sorted(found)}"


@pytest.mark.parametrize("module", ["vmctl.foreground.run", "vmctl.daemon.start"])
def test_a_plain_start_compiles_no_text(module: str) -> None:
    """An annotation in quotes in a NamedTuple starts Python's compiler, which costs ten modules."""
    assert _inspect(module, "print(*texts)") == []
