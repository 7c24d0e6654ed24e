"""Make docs/schemas/*.json, of what `status --json` and `events --json` print.

Without arguments they are printed; --write puts them in their places. A test compares.
"""

import json
import sys
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.protocol import attribute_documentation  # noqa: E402 - found by the line above
from vmctl.daemon.control import EVENT_FIELDS  # noqa: E402 - same
from vmd.wire import messages, parts  # noqa: E402 - same
from vmm_kvm.standard_streams import run_program  # noqa: E402 - same

PLACE = ROOT / "docs" / "schemas"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TITLES = {
    "status": "What vmctl status --json and vmctl show --json print: VMs",
    "events": "A line of vmctl events --json: something has happened to a VM",
}

Schema = dict[str, "Schema | list[Schema] | list[str] | str | int | float | bool | None"]


def schemas() -> dict[str, Schema]:
    """Return the schemas by the verbs that print such JSON."""
    event = _made(messages.Event)
    definitions = event["$defs"]
    assert isinstance(definitions, dict)
    printed = definitions.pop("Event")
    assert isinstance(printed, dict)
    properties = printed["properties"]
    assert isinstance(properties, dict)
    printed["properties"] = {name: properties[name] for name in EVENT_FIELDS}
    printed["required"] = list(EVENT_FIELDS)
    return {
        "status": _whole("status", _made(tuple[messages.VmInfo, ...])),
        "events": _whole("events", {**printed, "$defs": definitions}),
    }


def _whole(verb: str, schema: Schema) -> Schema:
    return {"$schema": _DIALECT, **schema, "title": _TITLES[verb]}


def _made(kind: object) -> Schema:
    """Return msgspec's schema of a type, with what the source says of each field.

    Answers leave no field out, so all are required.
    """
    made: Schema = msgspec.json.schema(kind)
    definitions = made["$defs"]
    assert isinstance(definitions, dict)
    told = {
        **attribute_documentation(Path(parts.__file__).read_text()),
        **attribute_documentation(Path(messages.__file__).read_text()),
    }
    for name, schema in definitions.items():
        assert isinstance(schema, dict)
        if "description" in schema:
            schema["description"] = " ".join(str(schema["description"]).split())
        properties = schema.get("properties")
        if not isinstance(properties, dict):
            continue
        schema["required"] = list(properties)
        for field, one in properties.items():
            assert isinstance(one, dict)
            one.pop("default", None)
            if (name, field) in told:
                one["description"] = told[name, field]
    return made


def text(schema: Schema) -> str:
    """Return a schema as its file has it."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    """Print the schemas, or write them."""
    for verb, schema in schemas().items():
        if sys.argv[1:] == ["--write"]:
            (PLACE / f"{verb}.json").write_text(text(schema))
        else:
            print(text(schema), end="")
    return 0


if __name__ == "__main__":
    run_program("schemas", main)
