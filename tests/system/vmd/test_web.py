"""`vmctl web` on a running daemon: HTTP, WebSockets, and refusals."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.json_schema import problems
from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import READY, ROOT, Client, Daemon, vm_block
from tests.system.vmd.users import USER
from tests.web import TIMEOUT_S, WebServer
from vmctl.web.command import web
from vmctl.web.operations import OPERATIONS

pytestmark = pytest.mark.kvm

Value = str | int | float | bool | list["Value"] | dict[str, "Value"] | None
Fields = dict[str, Value]
Schema = Mapping[str, Value]


@contextmanager
def served(tmp_path: Path, config: str = "") -> Iterator[tuple[WebServer, Client]]:
    """Run a daemon and a server that a client has logged in to."""
    with (
        Daemon(tmp_path, config) as vmd,
        vmd.client() as client,
        WebServer(vmd.socket) as server,
    ):
        server.log_in()
        yield server, client


def test_a_life(tmp_path: Path) -> None:
    """Operations are the protocol's, in the example too; WebSockets bring a console and events."""
    with served(tmp_path, vm_block("web")) as (server, client):
        _check_metrics(server)
        with server.stream("/api/events") as events:
            started = server.ask("POST", "/api/start", {"name": "web"})
            assert (started.status, started.told["type"]) == (200, "started"), started
            kinds = [json.loads(str(events.receive()))["kind"] for _ in range(2)]
            assert kinds == ["starting", "started"]
        refused = server.ask("POST", "/api/start", {"name": "web"})
        assert (refused.status, refused.told["code"]) == (409, "EALREADY")
        assert server.ask("GET", "/api/status?name=web").told["vms"] == [client.vm("web")]
        with server.stream("/api/console?name=web") as console:
            assert json.loads(str(console.receive()))["type"] == "console-opened"
            console.expect(READY)
            console.send(b"12")
            console.expect(b"12")
            console.send(b"")
            console.send("break")
            console.send(b"3")
            console.expect(b"3")
            for kind, state in (("pause", "paused"), ("unpause", "running")):
                assert server.ask("POST", f"/api/{kind}", {"name": "web"}).status == 200
                assert client.vm("web")["state"] == state
            force = {"name": "web", "force": True, "wait": True}
            assert server.ask("POST", "/api/stop", force).told["type"] == "terminated"
            assert console.read_to_end() == (1000, "")
        with server.stream("/api/console?name=web") as console:
            assert console.read_to_end() == (4409, "the VM is not running")
        with server.stream("/api/console?name=none") as console:
            assert console.read_to_end() == (4404, "no such VM")
        with server.stream("/api/console?nmae=web") as console:
            assert console.read_to_end() == (4400, "Object contains unknown field `nmae`")
        _check_example(server)


def _check_metrics(server: WebServer) -> None:
    answer = server.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families: list[Metric] = list(
        text_string_to_metric_families(answer.body.decode())  # type: ignore[no-untyped-call]
    )
    samples = {sample.name for one in families for sample in one.samples}
    assert {"vmd_vm_info", "vmd_vm_memory_limit_bytes", "vmd_starts_total"} <= samples


def _check_example(server: WebServer) -> None:
    for name, status in (("web", 0), ("none", 1)):
        done = subprocess.run(
            [sys.executable, ROOT / "examples" / "web_client.py", server.link, name],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        server.link = server.next_link()
        assert done.returncode == status, done
        if status == 0:
            assert done.stdout.startswith("web runs as process ")
            assert done.stdout.endswith("web is paused\nweb has ended\n")
        else:
            assert done.stderr == "none: ENOENT: no such VM\n"


def test_what_is_refused(tmp_path: Path) -> None:
    """No token, a used one, a stale cookie, a foreign origin or host: each is refused."""
    with served(tmp_path, vm_block("web")) as (server, client):
        host = f"127.0.0.1:{server.port}"
        stale = "a" * 43
        wrong: list[tuple[int, dict[str, str | None]]] = [
            (401, {"cookie": None}),
            (401, {"cookie": f"vmctl-web-{server.port}={stale}"}),
            (403, {"origin": "http://evil.example"}),
            (403, {"origin": "null"}),
            (403, {"origin": f"http://localhost:{server.port}"}),
            (403, {"sec-fetch-site": "cross-site"}),
            (403, {"host": f"evil.example:{server.port}"}),
            (403, {"host": f"evil.example:{server.port}", "origin": f"http://{host}"}),
        ]
        for status, headers in wrong:
            for method, path in (
                ("GET", "/"),
                ("GET", "/app.js"),
                ("GET", "/api/status"),
                ("GET", "/api/openapi.json"),
                ("GET", "/metrics"),
                ("GET", "/none"),
                ("POST", "/api/start"),
            ):
                body = {"name": "web"} if method == "POST" else None
                answer = server.ask(method, path, body, headers)
                assert (answer.status, answer.told["code"]) == (status, "EPERM"), (path, headers)
                assert not any(name.startswith("access-control") for name in answer.headers)
            for path in ("/api/console?name=web", "/api/events", "/none"):
                with server.stream(path, headers) as stream:
                    assert stream.status == 403, (path, headers)
        assert client.vm("web")["state"] == "stopped"
        used = server.link.partition(str(server.port))[2]
        assert server.ask("GET", used, headers={"cookie": None}).status == 200
        assert server.ask("GET", used, headers={"cookie": None}).status == 403
        # A form, and whatever a page of another origin can send without asking, is no request.
        for kind in ("text/plain", "application/x-www-form-urlencoded", None):
            answer = server.ask("POST", "/api/start", {"name": "web"}, {"content-type": kind})
            assert answer.status == 415
        assert server.ask("OPTIONS", "/api/start").status == 405
        assert server.ask("GET", "/api/start?name=web").status == 405
        assert server.ask("POST", "/api/status", {}).status == 405
        assert server.ask("GET", "/../vmctl/web/server.py").status == 404
        assert server.ask("POST", "/api/load", b" " * 70000).status == 413
        assert client.vm("web")["state"] == "stopped"
        policy = server.ask("GET", "/").headers["content-security-policy"]
        assert "script-src 'self';" in policy
        assert "default-src 'none'" in policy


def test_clients_that_leave(tmp_path: Path) -> None:
    """A request that a client no longer waits for is cancelled, and so is a console."""
    with served(tmp_path, vm_block("web", enabled=True)) as (server, client):
        client.wait_for_state("web", "running")
        body = b'{"name": "web"}'
        lines = (
            f"POST /api/wait HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nCookie: {server.cookie}",
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n",
        )
        before = _descriptors(server.process.pid)
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S) as waiting:
                waiting.sendall("\r\n".join(lines).encode() + body)
        for _ in range(5):
            with server.stream("/api/console?name=web") as console:
                console.expect(READY)
        deadline = time.monotonic() + TIMEOUT_S
        while _descriptors(server.process.pid) > before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert server.ask("GET", "/api/status?name=web").status == 200


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_the_daemon_ends(tmp_path: Path) -> None:
    """Without it requests are answered by 503 and a reason; a cookie ends with its server."""
    with Daemon(tmp_path, "") as vmd, WebServer(vmd.socket) as server:
        server.log_in()
        with server.stream("/api/events") as events:
            server.ask("GET", "/api/status")
            vmd.stop()
            assert events.read_to_end() == (4503, "the daemon has closed the connection")
        answer = server.ask("GET", "/api/status")
        assert (answer.status, answer.told["code"]) == (503, "command-failed")
        assert answer.told["message"].startswith(f"connect: {vmd.socket}: ")
        assert server.ask("GET", "/metrics").status == 503
        with Daemon(tmp_path, "") as again:
            assert server.ask("GET", "/api/status").status == 200
            assert server.process.stdout
            server.process.stdout.close()
            # The next link has no reader: the one before logs in all the same.
            path = server.link.partition(str(server.port))[2]
            assert server.ask("GET", path, headers={"cookie": None}).status == 200
            cookie, port = server.cookie, server.port
            server.process.terminate()
            server.process.wait(TIMEOUT_S)
            # The next server on the same port does not know the cookie.
            with WebServer(again.socket, port=port) as second:
                second.cookie = cookie
                assert second.ask("GET", "/api/status").status == 401


@pytest.mark.root
@needs_separation
def test_a_vm_of_another_user(reachable: Path) -> None:
    """The server has the rights of who runs it: another user's VM is seen, and not touched."""
    config = f"socket owner {USER}\n" + vm_block("web", enabled=True)
    with (
        Daemon(reachable, config, is_user=False) as vmd,
        vmd.client() as root,
        WebServer(vmd.socket, uid=USER) as server,
    ):
        pid = root.wait_for_state("web", "running")["pid"]
        server.log_in()
        assert server.ask("GET", "/api/status?name=web").told["vms"][0]["pid"] == pid
        for kind in ("stop", "pause", "unpause", "wait", "start", "snapshot"):
            answer = server.ask("POST", f"/api/{kind}", {"name": "web"})
            assert (answer.status, answer.told["code"]) == (403, "EPERM"), kind
        assert server.ask("GET", "/api/history?name=web").status == 403
        for kind in ("reload", "reset"):
            assert server.ask("POST", f"/api/{kind}", {}).status == 403
        with server.stream("/api/console?name=web") as console:
            assert console.read_to_end() == (4403, "the VM is not yours")
        assert root.vm("web")["pid"] == pid


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line names the missing part: the extra, the daemon, a port."""

    def said(port: str = "0") -> str:
        assert web(port=port) == 1
        output, errors = capsys.readouterr()
        assert output == ""
        return errors

    with Daemon(tmp_path, "") as vmd, socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("VMD_SOCKET", str(vmd.socket))
        port = str(taken.getsockname()[1])
        assert said(port) == f"vmctl: 127.0.0.1:{port}: Address already in use\n"
        for wrong in ("x", "65536", "-1", "\u0661"):
            assert said(wrong) == f"vmctl: invalid port: {wrong}\n"
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "uvicorn", None)
            needed = "vmctl: web needs uvicorn 0.32 or newer: pip install 'vmm-kvm[web]'\n"
            assert said() == needed
    assert said().startswith(f"vmctl: connect: {vmd.socket}: ")


# Requests inside and outside the document


def values(schema: Schema, schemas: Mapping[str, Schema]) -> st.SearchStrategy[Value]:
    """Return values that fit a schema of the document."""
    match schema:
        case {"$ref": str(name)}:
            return values(schemas[name.rpartition("/")[2]], schemas)
        case {"anyOf": list(several)}:
            return st.one_of([values(one, schemas) for one in several if isinstance(one, dict)])
        case {"enum": list(words)}:
            return st.sampled_from(words)
        case {"type": "integer"}:
            low, high = schema.get("minimum"), schema.get("maximum")
            assert isinstance(low, int | None)
            assert isinstance(high, int | None)
            return st.integers(low, high)
        case {"type": "string"}:
            longest = schema.get("maxLength")
            assert isinstance(longest, int)
            text = st.text(max_size=min(longest, 40)) | st.just("\0")
            pattern = schema.get("pattern")
            return text if pattern is None else text.filter(re.compile(str(pattern)).search)
        case {"type": "boolean"}:
            return st.booleans()
        case {"type": "null"}:
            return st.none()
        case {"type": "array", "prefixItems": list(items)}:
            return st.tuples(*(values(one, schemas) for one in items if isinstance(one, dict))).map(
                list
            )
        case {"type": "array", "items": dict(item)}:
            return st.lists(values(item, schemas), max_size=3)
        case {"type": "object", "properties": dict(properties)}:
            required = schema.get("required", [])
            assert isinstance(required, list)
            fields = {
                name: values(one, schemas)
                for name, one in properties.items()
                if isinstance(one, dict)
            }
            return st.fixed_dictionaries(
                {name: one for name, one in fields.items() if name in required},
                optional={name: one for name, one in fields.items() if name not in required},
            )
    raise AssertionError(f"a schema that this test does not know: {schema}")


EXAMPLES = 12
"""The number of requests for each operation, valid and random ones."""
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def test_every_operation_with_any_fields(tmp_path: Path) -> None:
    """Any request, valid by the document or not, gets an answer of the protocol, never a 500."""
    with served(tmp_path) as (server, client):
        document = server.ask("GET", "/api/openapi.json").told
        schemas = document["components"]["schemas"]
        asked: dict[str, set[int]] = {}

        def ask(path: str, method: str, fields: Value) -> None:
            if method == "get":
                assert isinstance(fields, dict)
                told = {name: _in_query(value) for name, value in fields.items()}
                answer = server.ask("GET", f"{path}?{urllib.parse.urlencode(told)}")
            else:
                answer = server.ask("POST", path, fields)
            asked.setdefault(path, set()).add(answer.status)
            assert answer.status < 500, (path, fields, answer)
            responses = document["paths"][path][method]["responses"]
            response = responses["200" if answer.status == 200 else "default"]
            schema = response["content"]["application/json"]["schema"]
            assert list(problems(answer.told, schema, document)) == []

        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                if path.removeprefix("/api/") not in OPERATIONS:
                    continue
                valid = _valid(operation, schemas)
                wrong = st.dictionaries(st.text(max_size=8), ANY, max_size=3)
                mixed = st.tuples(valid, wrong).map(lambda two: {**two[0], **two[1]})
                anything = mixed if method == "get" else mixed | ANY
                for strategy in (valid, anything):
                    _for_each(strategy, partial(ask, path, method))
        assert len(asked) == len(OPERATIONS)
        assert all(400 in statuses for statuses in asked.values()), asked
        assert client.ask("status")["type"] == "vms"


def _for_each(strategy: st.SearchStrategy[Value], check: Callable[[Value], None]) -> None:
    @settings(max_examples=EXAMPLES, database=None)
    @given(strategy)
    def run(fields: Value) -> None:
        check(fields)

    run()


def _valid(operation: Schema, schemas: Mapping[str, Schema]) -> st.SearchStrategy[Fields]:
    """Return fields that an operation of the document takes."""
    match operation:
        case {"parameters": list(parameters)}:
            fields: dict[str, st.SearchStrategy[Value]] = {}
            for one in parameters:
                match one:
                    case {"name": str(name), "schema": dict(schema), "required": False}:
                        fields[name] = values(schema, schemas)
            assert len(fields) == len(parameters)
            return st.fixed_dictionaries({}, optional=fields)
        case {"requestBody": {"content": {"application/json": {"schema": dict(schema)}}}}:
            return values(schema, schemas).map(
                lambda value: value if isinstance(value, dict) else {}
            )
    raise AssertionError(f"an operation without fields: {operation}")


def _in_query(value: Value) -> str:
    return value if isinstance(value, str) else json.dumps(value)
