"""Run a VM over HTTP, by the OpenAPI document: `web_client.py LINK NAME`.

LINK is what `vmctl web` prints; it logs in once. The methods of `Api` are the document's
operations: `api.start(name="web")` calls its operation `start`. Nothing beyond Python is needed.
"""

import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from http.cookiejar import CookieJar
from typing import Any, Protocol

Fields = dict[str, Any]  # type: ignore[explicit-any] # what JSON holds


class Call(Protocol):
    """An operation; its fields are named."""

    def __call__(self, **fields: object) -> Fields:
        """Return the answer."""


class RefusedError(Exception):
    """The server says no; `str()` has the protocol's code, and the reason."""


class Api:
    """The operations of a server, made from its OpenAPI document."""

    def __init__(self, link: str) -> None:
        """Log in by a link, and read the document."""
        self._base = link
        self._operations: dict[str, tuple[str, str]] = {}
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        with self._opener.open(link, timeout=60) as page:
            page.read()
        document = self._exchange("GET", "/api/openapi.json", None)
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                if path.startswith("/api/") and "101" not in operation["responses"]:
                    self._operations[operation["operationId"]] = method.upper(), path

    def __getattr__(self, name: str) -> Call:
        """Return the operation of this name."""
        if name not in self._operations:
            raise AttributeError(f"the server has no operation {name}")
        method, path = self._operations[name]

        def call(**fields: object) -> Fields:
            if method == "GET":
                told = {name: json.dumps(one).strip('"') for name, one in fields.items()}
                return self._exchange("GET", f"{path}?{urllib.parse.urlencode(told)}", None)
            return self._exchange(method, path, json.dumps(fields).encode())

        return call

    def _exchange(self, method: str, path: str, body: bytes | None) -> Fields:
        request = urllib.request.Request(  # noqa: S310 - the link is the user's own
            urllib.parse.urljoin(self._base, path),
            data=body,
            method=method,
            headers={"Content-Type": "application/json"},
        )
        try:
            with self._opener.open(request, timeout=60) as answer:
                told: Fields = json.load(answer)
                return told
        except urllib.error.HTTPError as err:
            with err:
                refusal = json.load(err)
            raise RefusedError(f"{refusal['code']}: {refusal['message']}") from None


def main(link: str, name: str) -> int:
    """Start, pause, continue and stop a VM; returns the exit status."""
    try:
        api = Api(link)
        started = api.start(name=name)
        print(f"{name} runs as process {started['pid']}, its console is {started['tty']}")
        api.pause(name=name)
        vms = api.status(name=name)["vms"]
        print(f"{name} is {vms[0]['state']}")
        api.unpause(name=name)
        api.stop(name=name, force=True, wait=True)
        print(f"{name} has ended")
    except (RefusedError, OSError) as err:
        print(f"{name}: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
