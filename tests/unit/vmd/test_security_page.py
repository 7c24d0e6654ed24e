"""docs/security.md: each listed attack has tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "security.md"
ATTACKS = 17


def _functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_attack_has_a_test() -> None:
    """Each attack has a row, with existing tests."""
    _, _, section = PAGE.read_text().partition("## Attacks, and the tests that repeat them")
    rows = [line.split("|")[1:-1] for line in section.splitlines() if re.match(r"\| \d", line)]
    assert [int(row[0]) for row in rows] == [*range(1, ATTACKS + 1)]
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row[-1])
        assert named, row
        missing = [test for path, test in named if test not in _functions(path)]
        assert missing == []
