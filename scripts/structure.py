#!/usr/bin/env python3
"""Print the folders of the tree, their sizes and the edges between them, by tests/layers.py.

scripts/structure.py            folders, sizes, edges, cycles
scripts/structure.py --write    put the table of layers into docs/architecture.md
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import layers
from vmm_kvm.standard_streams import run_program

BEGIN = "<!-- layers: made from tests/layers.py by scripts/structure.py --write -->\n"
END = "<!-- end of layers -->\n"


def purpose(name: str, files: dict[str, Path]) -> str:
    """Return the first sentence of the docstring of a folder or module."""
    path = files.get(name)
    text = ast.get_docstring(ast.parse(path.read_text())) if path else None
    return (text or "").split("\n\n")[0].split(". ")[0].replace("\n", " ").rstrip(".")


def table(files: dict[str, Path]) -> str:
    """Return the table of layers as Markdown."""
    rows = ["| | may import | |", "|---|---|---|"]
    for name, targets in layers.LAYERS.items():
        named = ", ".join(f"`{target}`" for target in targets) or "nothing"
        rows.append(f"| `{name}` | {named} | {purpose(name, files)} |")
    return "\n".join(rows) + "\n"


def documented(text: str, made: str) -> str:
    """Return a page with the table between its marks."""
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n{made}\n{text[end:]}"


def report(files: dict[str, Path]) -> str:
    """Return the folders with their modules and lines, and the edges between them."""
    modules: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    targets: dict[str, Counter[str]] = {}
    for name, path in files.items():
        folder = layers.folder_of(name, files)
        modules[folder] += 1
        lines[folder] += len(path.read_text().splitlines())
    for one in layers.all_imports():
        if one.imported in files:
            source = layers.folder_of(one.importer, files)
            target = layers.folder_of(one.imported, files)
            if source != target:
                targets.setdefault(source, Counter())[target] += 1
    out = [f"{'folder':<28} {'modules':>7} {'lines':>6}  imports (statements)"]
    for folder in sorted(modules):
        to = ", ".join(f"{name} {count}" for name, count in sorted(targets.get(folder, {}).items()))
        out.append(f"{folder:<28} {modules[folder]:>7} {lines[folder]:>6}  {to}")
    found = layers.cycles(targets)
    out += [f"cycle of folders: {', '.join(sorted(one))}" for one in found]
    out += [
        f"cycle inside a folder: {', '.join(sorted(names))}: {reason}"
        for names, reason in layers.CYCLES.items()
    ]
    return "\n".join(out)


def main() -> int:
    """Print, or write."""
    files = layers.module_files()
    if sys.argv[1:] == ["--write"]:
        page = layers.ROOT / layers.EXPLAINED
        page.write_text(documented(page.read_text(), table(files)))
        return 0
    if sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        return 2
    print(report(files))
    return 0


if __name__ == "__main__":
    run_program("structure", main)
