"""JSON Schema, as much of it as msgspec writes: does a value fit a schema?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
_SAID = {"$schema", "$defs", "title", "description", "default", "type"}


def problems(value: object, schema: object, whole: object, at: str = "$") -> Iterator[str]:
    """Yield what of a value does not fit a schema, a line each; references lead into `whole`.

    A keyword that this does not know is a problem too.
    """
    assert isinstance(schema, Mapping), schema
    kind = schema.get("type")
    if isinstance(kind, str):
        is_number = isinstance(value, int) and not isinstance(value, bool)
        fits = is_number if kind == "integer" else isinstance(value, _TYPES[kind])
        if not fits or (kind == "number" and isinstance(value, bool)):
            yield f"{at}: no {kind}: {value!r}"
            return
    for keyword, wanted in schema.items():
        if keyword not in _SAID:
            if keyword == "additionalProperties" and wanted is False and isinstance(value, dict):
                known = schema["properties"]
                yield from (f"{at}: has {name}" for name in value if name not in known)
            else:
                yield from _keyword((keyword, wanted), value, whole, at)


def _keyword(said: tuple[str, object], value: object, whole: object, at: str) -> Iterator[str]:
    keyword, wanted = said
    match keyword, wanted, value:
        case "$ref", str(reference), _:
            yield from problems(value, _found(whole, reference), whole, at)
        case (("anyOf" | "oneOf"), Sequence() as several, _):
            if all(any(problems(value, one, whole, at)) for one in several):
                yield f"{at}: fits none of {several}: {value!r}"
        case "enum", Sequence() as words, _:
            if value not in words:
                yield f"{at}: none of {words}: {value!r}"
        case "required", Sequence() as names, Mapping():
            yield from (f"{at}: lacks {name}" for name in names if name not in value)
        case "properties", Mapping() as properties, Mapping():
            for name, one in properties.items():
                if name in value:
                    yield from problems(value[name], one, whole, f"{at}.{name}")
        case "items", Mapping() as item, Sequence():
            for index, one in enumerate(value):
                yield from problems(one, item, whole, f"{at}[{index}]")
        case (("maxLength" | "maxItems"), int(most), (str() | list())):
            if len(value) > most:
                yield f"{at}: longer than {most}"
        case "minimum", int(least), (int() | float()):
            if value < least:
                yield f"{at}: less than {least}: {value}"
        case "maximum", int(most), (int() | float()):
            if value > most:
                yield f"{at}: more than {most}: {value}"
        case "pattern", str(pattern), str():
            if not re.search(pattern, value):
                yield f"{at}: is not {pattern}: {value!r}"
        case _:
            yield f"{at}: a keyword that is not understood: {keyword}"


def _found(whole: object, reference: str) -> object:
    found = whole
    for part in reference.removeprefix("#/").split("/"):
        assert isinstance(found, Mapping)
        found = found[part]
    return found
