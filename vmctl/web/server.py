"""The web server: the page, the protocol over HTTP, consoles and events by WebSockets.

Each request has a connection to the control socket of its own. When a client leaves, its
connection is closed, and the daemon cancels what it waited for.
"""

from collections.abc import Callable
from importlib.resources import files
from typing import NamedTuple

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from vmctl.daemon.metrics import lines
from vmctl.web import operations, streams
from vmctl.web.access import LOGIN_PATH, Access
from vmctl.web.daemon import Connection, DaemonError
from vmctl.web.description import document
from vmctl.web.operations import OPERATIONS, RequestError
from vmctl.web.waiting import first
from vmd.wire.messages import (
    DAEMON_TO_CLIENT,
    AnyAnswer,
    AnyRequest,
    Counts,
    ErrorCode,
    Failed,
    Status,
    Totals,
    Vms,
)

_JSON = "application/json"
_LEFT = 499
"""An answer that is not read: the client has left."""
_CODES = {
    401: ErrorCode.EPERM,
    403: ErrorCode.EPERM,
    404: ErrorCode.ENOENT,
    503: ErrorCode.COMMAND_FAILED,
}
_POLICIES = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self' 'unsafe-inline'",  # the terminal makes a style sheet of its colours
    "connect-src 'self'",
    "img-src 'self' data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
)
_HEADERS = {
    "content-security-policy": "; ".join(_POLICIES),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
}
_LOGGED_IN = """\
<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=/">
<title>vmctl web</title><p><a href="/">Logged in</a>
"""
"""A redirection would still count as the foreign page's that the link may stand on."""


class Part(NamedTuple):
    """A file of the page."""

    content: bytes
    kind: str


def parts() -> dict[str, Part]:
    """Return the files of the page, by their paths in a URL."""
    top = files("vmctl.web") / "page"
    folders = {"": top, "xterm/": top / "xterm"}
    found = {
        f"/{prefix}{one.name}": Part(one.read_bytes(), _TYPES[f".{one.name.rpartition('.')[2]}"])
        for prefix, folder in folders.items()
        for one in folder.iterdir()
        if f".{one.name.rpartition('.')[2]}" in _TYPES
    }
    return {**found, "/": found["/index.html"]}


def application(path: str, access: Access, on_login: Callable[[], None] = lambda: None) -> ASGIApp:
    """Return the application.

    Args:
        path: of the control socket.
        access: lets requests in.
        on_login: called when a link has been used.
    """
    web = _Web(path, access, on_login)
    routes = [
        Route(LOGIN_PATH, web.log_in, methods=["GET"]),
        Route("/api/openapi.json", web.describe, methods=["GET"]),
        Route("/metrics", web.metrics, methods=["GET"]),
        WebSocketRoute("/api/console", web.console),
        WebSocketRoute("/api/events", web.events),
        *(
            Route(f"/api/{kind}", web.ask, methods=["GET" if one.is_read else "POST"])
            for kind, one in OPERATIONS.items()
        ),
        *(Route(path, web.part, methods=["GET"]) for path in web.parts),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={HTTPException: _failed_http, DaemonError: _failed_daemon},
    )
    return _Gate(app, access)


class _Gate:
    """Refuses what `Access` refuses, before anything reads it, and adds headers to all answers."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        connection = HTTPConnection(scope)
        refusal = self._access.refusal(
            scope["path"], connection.headers.items(), connection.cookies
        )
        if refusal is None:
            await self._app(scope, receive, with_headers)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})  # 403
        else:
            await _failed(refusal.status, refusal.message)(scope, receive, with_headers)


class _Web:
    """Answers requests that have been let in."""

    def __init__(self, path: str, access: Access, on_login: Callable[[], None]) -> None:
        self._path = path
        self._access = access
        self._on_login = on_login
        self._document = msgspec.json.encode(document())
        self.parts = parts()

    async def log_in(self, request: Request) -> Response:
        session = self._access.log_in(request.query_params.get("token", ""))
        if session is None:
            return _failed(403, "this link is used up; vmctl web has printed a newer one")
        response = HTMLResponse(_LOGGED_IN)
        response.set_cookie(
            self._access.cookie, session, httponly=True, samesite="strict", path="/"
        )
        self._on_login()
        return response

    async def part(self, request: Request) -> Response:
        part = self.parts[request.url.path]
        return Response(part.content, media_type=part.kind)

    async def describe(self, _request: Request) -> Response:
        return Response(self._document, media_type=_JSON)

    async def metrics(self, request: Request) -> Response:
        vms = await self._ask(request, Status(statistics=True, interfaces=True))
        totals = await self._ask(request, Counts())
        if not isinstance(vms, Vms) or not isinstance(totals, Totals):
            raise DaemonError("unexpected response received from vmd")
        text = "\n".join(lines(msgspec.to_builtins(vms.vms), msgspec.to_builtins(totals))) + "\n"
        kind = "application/openmetrics-text; version=1.0.0; charset=utf-8"
        return Response(text, headers={"content-type": kind})

    async def ask(self, request: Request) -> Response:
        operation = OPERATIONS[request.url.path.removeprefix("/api/")]
        try:
            if operation.is_read:
                asked = operations.from_query(operation.request, request.query_params.multi_items())
            else:
                asked = operations.from_body(operation, await _body(request))
        except RequestError as err:
            return _failed(400, str(err))
        return _answered(await self._ask(request, asked))

    async def _ask(self, request: Request, asked: AnyRequest) -> AnyAnswer:
        """Return the daemon's answer, unless the client leaves before."""
        with Connection(self._path) as daemon:
            answer = await first(daemon.ask(asked), _left(request))
        if answer is None:
            raise HTTPException(_LEFT, "the client has left")
        return answer

    async def console(self, websocket: WebSocket) -> None:
        await streams.serve(websocket, streams.console(websocket, self._path))

    async def events(self, websocket: WebSocket) -> None:
        await streams.serve(websocket, streams.events(websocket, self._path))


async def _left(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """Return a request's body.

    Raises:
        HTTPException: it is too long, or is said to be something else than JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > operations.BODY_MAX:
            raise HTTPException(413, f"more than {operations.BODY_MAX} bytes")
    # A page of another origin cannot send this kind without asking first.
    if kind != _JSON:
        raise HTTPException(415, f"the content type is not {_JSON}")
    return body


def _answered(answer: AnyAnswer) -> Response:
    data = DAEMON_TO_CLIENT.encode(answer)
    return Response(data, operations.status_of(answer), media_type=_JSON)


def _failed(status: int, message: str) -> Response:
    """Return a refusal of ours, in the form of the daemon's."""
    code = _CODES.get(status, ErrorCode.EINVAL)
    data = DAEMON_TO_CLIENT.encode(Failed(code=code, message=message))
    return Response(data, status, media_type=_JSON)


def _failed_http(_request: Request, err: Exception) -> Response:
    assert isinstance(err, HTTPException)
    response = _failed(err.status_code, err.detail)
    response.headers.update(err.headers or {})
    return response


def _failed_daemon(_request: Request, err: Exception) -> Response:
    return _failed(503, str(err))
