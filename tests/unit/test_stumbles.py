"""The table of users' complaints names tests that exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.stumbles import STUMBLES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", STUMBLES)
def test_each_kind_has_its_tests(kind: str) -> None:
    """Each test of a kind is a function of its file."""
    for place in STUMBLES[kind]:
        path, _, name = place.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, place


def test_no_test_is_named_twice_for_a_kind() -> None:
    """A kind lists a test once."""
    for places in STUMBLES.values():
        assert len(places) == len(set(places))
