"""The OpenAPI document of `vmctl web`, and the requests that it describes."""

from __future__ import annotations

import hashlib
import json
import re
import typing
from pathlib import Path

import msgspec
import pytest

from vmctl.web import operations
from vmctl.web.description import document
from vmctl.web.operations import (
    LEFT_OUT,
    OPERATIONS,
    STREAMS,
    RequestError,
    from_body,
    from_query,
    indices,
)
from vmd.wire import messages, parts, transfers

ROOT = Path(__file__).resolve().parents[3]
XTERM = ROOT / "vmctl" / "web" / "page" / "xterm"


def test_every_request_is_described_or_left_out() -> None:
    """No request of the protocol is forgotten; answers are those that its documentation names."""
    kinds = {str(one.__struct_config__.tag): one for one in typing.get_args(messages.AnyRequest)}
    assert sorted(kinds) == sorted([*OPERATIONS, *STREAMS, *LEFT_OUT])
    for kind, operation in OPERATIONS.items():
        named = re.findall(r"answered by\s+`([a-z-]+)`", kinds[kind].__doc__ or "", re.IGNORECASE)
        told = {answer.__struct_config__.tag for answer in operation.answers}
        assert set(named) <= told, kind


def test_every_reference_leads_somewhere() -> None:
    """The document is whole: references, parameters, operation ids that differ, known schemas."""
    text = json.dumps(document())
    made = document()
    schemas = made["components"]["schemas"]  # type: ignore[index]
    for name in re.findall(r'"\$ref": "#/components/schemas/(\w+)"', text):
        assert name in schemas, name
    used = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', text))
    assert set(schemas) - used <= {"Event", "EventKind"}
    ids = re.findall(r'"operationId": "(\w+)"', text)
    assert len(ids) == len(set(ids)) == len(OPERATIONS) + len(STREAMS) + 1
    assert text.count('"summary"') == len(ids) + 1
    assert made["openapi"] == "3.1.0"


def test_no_index_of_a_descriptor_is_described() -> None:
    """HTTP carries no descriptors: fields that name one are neither described nor taken."""
    schemas = document()["components"]["schemas"]  # type: ignore[index]
    assert indices(messages.Start) == ["kernel", "initrd", "cdrom_image"]
    assert indices(parts.DiskRequest) == ["chain"]
    assert indices(transfers.Snapshot) == ["file"]
    for struct in (messages.Start, parts.DiskRequest, transfers.Snapshot):
        assert not set(indices(struct)) & set(schemas[struct.__name__]["properties"])
        assert not {"type", "version"} & set(schemas[struct.__name__]["properties"])
    assert schemas["Start"]["required"] == []
    assert schemas["DiskRequest"]["required"] == ["path"]
    assert "serial" in schemas["DiskRequest"]["properties"]  # the disk's, not the request's


@pytest.mark.parametrize(
    ("kind", "body", "told"),
    [
        ("pause", b"[]", "Expected `object`"),
        ("pause", b"{", "Input data was truncated"),
        ("pause", b'{"id": -1}', "Expected `int` >= 0 - at `$.id`"),
        ("pause", b'{"id": "1"}', "Expected `int`, got `str` - at `$.id`"),
        ("pause", b'{"nmae": "web"}', "Object contains unknown field `nmae`"),
        ("pause", b'{"type": "stop"}', "Object contains unknown field `type`"),
        ("pause", b'{"serial": 1}', "Object contains unknown field `serial`"),
        ("start", b'{"kernel": 0}', "a descriptor's index, `kernel`"),
        ("start", b'{"initrd": [0]}', "a descriptor's index, `initrd`"),
        ("start", b'{"disks": [{"path": "/a", "chain": [0]}]}', "index, `disks.chain`"),
        ("snapshot", b'{"file": 0}', "a descriptor's index, `file`"),
        ("clone", b"{}", "Object missing required field `clone`"),
        ("pause", b'{"name": "\xff"}', "Invalid UTF-8"),
        ("pause", b"[" * 60000, "nested too deep"),
    ],
)
def test_what_is_no_request(kind: str, body: bytes, told: str) -> None:
    """A bad request is refused in one line with its fault."""
    with pytest.raises(RequestError) as refused:
        from_body(OPERATIONS[kind], body)
    assert told.lower() in str(refused.value).lower()
    assert "\n" not in str(refused.value)


def test_requests() -> None:
    """Bodies and queries are the protocol's requests."""
    assert from_body(OPERATIONS["reload"], b"") == messages.Reload()
    body = msgspec.json.encode({"name": "web", "kernel": None, "memory": 1 << 30})
    assert from_body(OPERATIONS["start"], body) == messages.Start(name="web", memory=1 << 30)
    pairs = [("id", "3"), ("statistics", "true"), ("gone", "0")]
    wanted = messages.Status(id=3, statistics=True)
    assert from_query(messages.Status, pairs) == wanted
    for wrong in ([("id", "3"), ("id", "4")], [("id", "x")], [("type", "stop")], [("x", "1")]):
        with pytest.raises(RequestError):
            from_query(messages.Status, wrong)


def test_refusals_have_statuses() -> None:
    """Each code of the protocol is a status of HTTP that blames the client, not the server."""
    for code in messages.ErrorCode:
        assert 400 <= operations.status_of(messages.Failed(code=code)) < 500
    assert operations.status_of(messages.Done()) == 200


def test_the_page_makes_no_html_of_text() -> None:
    """Names and messages are set as text; nothing is evaluated, no script stands in the page."""
    page = XTERM.parent
    for path in page.glob("*.js"):
        text = path.read_text()
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|\.write\w*\(<|eval\(|srcdoc", text
        )
    html = (page / "index.html").read_text()
    assert re.findall(r"<script[^>]*>", html) == ['<script type="module" src="/app.js">']
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:|https?:", html)


def test_vendored_files_are_what_was_released() -> None:
    """docs/web.md has the hash of each file that is not ours, and no other is there."""
    page = (ROOT / "docs" / "web.md").read_text()
    named = dict(
        re.findall(r"^\| `xterm/([\w.-]+)` \| .* \| `([0-9a-f]{64})` \|$", page, re.MULTILINE)
    )
    there = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in XTERM.iterdir()}
    assert named == there
