"""The OpenAPI document, made from the types of the control protocol's messages."""

import inspect
from collections.abc import Mapping

import msgspec

from vmctl.web.operations import OPERATIONS, OWN_FIELDS, STREAMS, Operation, indices
from vmd.wire.messages import AnyRequest, Event, Failed
from vmd.wire.parts import PROTOCOL_VERSION, DiskRequest
from vmm_kvm.version import version

Schema = dict[str, "object"]
_REFERENCE = "#/components/schemas/{name}"
_STREAMS_SAID = {
    "console": (
        "A VM's console, by a WebSocket. Binary messages are output, and input; the first message"
        " is text, the protocol's `console-opened` as JSON. The text `break` is a BREAK. It closes"
        " with 1000 when the VM ends, and with 4000 and the status of HTTP when it is refused."
    ),
    "events": (
        "Events of VMs from now on, by a WebSocket: each is a text message, the protocol's `event`"
        " as JSON."
    ),
}


def document() -> Schema:
    """Return the document, as OpenAPI 3.1 has it."""
    requests = [operation.request for operation in OPERATIONS.values()]
    answers = {answer for operation in OPERATIONS.values() for answer in operation.answers}
    kinds = [*requests, *sorted(answers, key=lambda kind: kind.__name__), Failed, Event]
    _, components = msgspec.json.schema_components(kinds, ref_template=_REFERENCE)
    _, asked = msgspec.json.schema_components(requests)
    for name, schema in components.items():
        if name not in asked and "properties" in schema:  # answers leave no field out
            schema["required"] = list(schema["properties"])
    for struct in (*requests, DiskRequest):
        _leave_out(components[struct.__name__], struct)
    for schema in components.values():
        if "description" in schema:
            schema["description"] = _said(str(schema["description"]))
    paths: dict[str, object] = {
        f"/api/{kind}": {"get" if operation.is_read else "post": _operation(operation, components)}
        for kind, operation in OPERATIONS.items()
    }
    for kind, request in STREAMS.items():
        paths[f"/api/{kind}"] = {"get": _stream(kind, request)}
    for operation in OPERATIONS.values():
        if operation.is_read:
            components.pop(operation.request.__name__)
    paths["/metrics"] = {"get": _metrics()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vmctl web",
            "summary": "vmd's control protocol over HTTP, with the rights of who runs vmctl web.",
            "version": version(),
            "license": {"name": "ISC", "identifier": "ISC"},
            "x-protocol-version": PROTOCOL_VERSION,
        },
        "servers": [{"url": "/"}],
        "security": [{"cookie": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "cookie": {
                    "type": "apiKey",
                    "in": "cookie",
                    "name": "vmctl-web-PORT",
                    "description": "Set by the link that vmctl web prints, which works once.",
                }
            },
        },
    }


def _said(text: str) -> str:
    """Return a docstring's paragraphs, each on one line."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))


def _leave_out(schema: Schema, struct: type[msgspec.Struct]) -> None:
    """Take the fields out of a schema that HTTP has no use for."""
    own = OWN_FIELDS if struct is not DiskRequest else ()
    gone = {*own, *indices(struct)}
    properties = schema["properties"]
    assert isinstance(properties, dict)
    schema["properties"] = {name: one for name, one in properties.items() if name not in gone}
    required = schema.get("required", [])
    assert isinstance(required, list)
    schema["required"] = [name for name in required if name not in gone]


def _operation(operation: Operation, components: Mapping[str, Schema]) -> Schema:
    schema = components[operation.request.__name__]
    summary, _, more = _said(operation.request.__doc__ or "").partition("\n\n")
    told: Schema = {
        "operationId": operation.kind.replace("-", "_"),
        "summary": summary,
        **({"description": more} if more else {}),
        "responses": {
            "200": _answers([answer.__name__ for answer in operation.answers]),
            "default": _answers(["Failed"]),
        },
    }
    if operation.is_read:
        told["parameters"] = _parameters(schema)
    else:
        is_needed = bool(schema["required"])
        content = {"application/json": {"schema": _reference(operation.request.__name__)}}
        told["requestBody"] = {"required": is_needed, "content": content}
    return told


def _reference(name: str) -> Schema:
    return {"$ref": _REFERENCE.format(name=name)}


def _answers(names: list[str]) -> Schema:
    schemas = [_reference(name) for name in names]
    schema = schemas[0] if len(schemas) == 1 else {"oneOf": schemas}
    return {
        "description": "Refused, and nothing has changed." if names == ["Failed"] else "Done.",
        "content": {"application/json": {"schema": schema}},
    }


def _parameters(schema: Schema) -> list[Schema]:
    properties, required = schema["properties"], schema["required"]
    assert isinstance(properties, dict)
    assert isinstance(required, list)
    return [
        {"name": name, "in": "query", "required": name in required, "schema": one}
        for name, one in properties.items()
    ]


def _stream(kind: str, request: type[AnyRequest]) -> Schema:
    schema = msgspec.json.schema(request)["$defs"][request.__name__]
    _leave_out(schema, request)
    return {
        "operationId": kind,
        "summary": _STREAMS_SAID[kind].partition(". ")[0].partition(":")[0].rstrip(".") + ".",
        "description": _STREAMS_SAID[kind],
        "parameters": _parameters(schema),
        "responses": {
            "101": {"description": "A WebSocket."},
            "default": _answers(["Failed"]),
        },
    }


def _metrics() -> Schema:
    return {
        "operationId": "metrics",
        "summary": "What VMs use, as vmctl metrics prints it.",
        "responses": {
            "200": {
                "description": "OpenMetrics 1.0.",
                "content": {"application/openmetrics-text": {"schema": {"type": "string"}}},
            },
            "default": _answers(["Failed"]),
        },
    }
