"""A web server for guests that records their requests."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Request:
    """A request's line, its client, and the status of the answer."""

    client: str
    path: str
    status: int


class WebServer(http.server.ThreadingHTTPServer):
    """A web server on every address of the network of the thread that makes it.

    `requests` are the answered ones.
    """

    def __init__(self, root: Path, port: int = 80) -> None:
        """Open the socket, to serve the files below `root`."""
        self.requests: list[Request] = []
        super().__init__(("0.0.0.0", port), partial(_Handler, directory=str(root)))

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Answer requests in a thread while the context lasts; then the socket is closed."""
        thread = threading.Thread(target=self.serve_forever)
        thread.start()
        try:
            yield
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: WebServer

    def log_request(
        self,
        code: int | str = "-",
        size: int | str = "-",  # noqa: ARG002 - the base class's
    ) -> None:
        """Record a request."""
        self.server.requests.append(Request(self.client_address[0], self.path, int(code)))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Log nothing."""
