"""The schemas of the commands' JSON: files made from the types."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from scripts import schemas
from tests.json_schema import problems
from vmd.wire.messages import EventKind, State, VmInfo

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("verb", ["status", "events"])
def test_the_files_are_up_to_date(verb: str) -> None:
    """docs/schemas has what scripts/schemas.py makes of the messages."""
    made = schemas.text(schemas.schemas()[verb])
    assert (schemas.PLACE / f"{verb}.json").read_text() == made


def test_what_fits() -> None:
    """A VM fits; without a field, with a wrong type or word it does not: the judge is one."""
    schema = json.loads((schemas.PLACE / "status.json").read_text())
    vm = VmInfo(id=1, name="web", state=State.STOPPED, cpus=1, memory=1 << 29)
    value = json.loads(msgspec.json.encode(vm))
    assert list(problems([value], schema, schema)) == []
    assert list(problems([{**value, "later": 1}], schema, schema)) == []
    for wrong in (
        {**value, "id": "1"},
        {**value, "id": True},
        {**value, "state": "asleep"},
        {**value, "pid": 1.5},
        {**value, "interfaces": [{}]},
        {name: one for name, one in value.items() if name != "cpus"},
    ):
        assert len(list(problems([wrong], schema, schema))) >= 1
    assert list(problems({}, schema, schema)) == ["$: no array: {}"]


def test_every_event_fits() -> None:
    """Each kind of event has its word in the schema."""
    schema = json.loads((schemas.PLACE / "events.json").read_text())
    for kind in EventKind:
        event = {"at": 1e9, "id": 1, "name": "web", "kind": kind.value, "message": ""}
        assert list(problems(event, schema, schema)) == []
