"""The table of users' complaints names tests that exist."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.siblings import SIBLINGS
from tests.stumbles import STUMBLES

ROOT = Path(__file__).resolve().parents[2]
LEAST_SIBLINGS = 3


@cache
def source(path: str) -> str:
    """Return the text of a file of tests."""
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def functions(path: str) -> set[str]:
    """Return the names of the functions of a file of tests."""
    tree = ast.parse(source(path))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("kind", STUMBLES)
def test_each_kind_has_its_tests(kind: str) -> None:
    """Each test of a kind is a function of its file."""
    for place in STUMBLES[kind]:
        path, _, name = place.partition("::")
        assert name in functions(path), place


def test_no_test_is_named_twice_for_a_kind() -> None:
    """A kind lists a test once."""
    for places in STUMBLES.values():
        assert len(places) == len(set(places))


@pytest.mark.parametrize("kind", SIBLINGS)
def test_each_kind_has_siblings(kind: str) -> None:
    """A kind has three siblings, each with a test, and a parametrisation where one is named."""
    assert kind in STUMBLES
    siblings = SIBLINGS[kind]
    assert len(siblings) == len(set(siblings.values())) >= LEAST_SIBLINGS
    for place in siblings.values():
        path, _, test = place.partition("::")
        name, _, parameters = test.removesuffix("]").partition("[")
        assert name in functions(path), place
        assert all(part in source(path) for part in parameters.split("-")), place
