"""`vmctl web`: serve a page on 127.0.0.1, with the rights of who runs it, until interrupted."""

import importlib.metadata
import importlib.util
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from vmctl.client import Client, CommandError
from vmctl.messages import fail
from vmd.shared.paths import client_socket

_NEEDED = {"starlette": (0, 46), "uvicorn": (0, 32), "wsproto": (1, 2)}
"""The oldest versions that serve, as pyproject.toml has them."""
_ADDRESS = "127.0.0.1"
_PORT_MAX = 65535
_MESSAGE_MAX = 64 << 10
_CONNECTIONS_MAX = 256
_LEAVE_S = 1
"""How long requests under way may take when the server ends."""


def web(_words: Sequence[str] = (), *, port: str = "0") -> int:
    """Serve on `port`, or on any that is free, until interrupted."""
    lacking = [
        f"{name} {'.'.join(map(str, least))}"
        for name, least in _NEEDED.items()
        if _version(name) < least
    ]
    if lacking:
        return fail(f"web needs {', '.join(lacking)} or newer: pip install 'vmm-kvm[web]'")
    try:
        path = client_socket(os.environ)
        with Client(path):
            pass
        listener = _listen(port)
    except CommandError as err:
        return fail(err)
    with listener:
        _serve(path, listener)
    return 0


def _version(name: str) -> tuple[int, ...]:
    """Return the version of a library that is installed; nothing if none is."""
    if importlib.util.find_spec(name) is None:
        return ()
    numbers = importlib.metadata.version(name).split(".")[:2]
    return tuple(int(number) for number in numbers if number.isdecimal())


def _listen(port: str) -> socket.socket:
    if not (port.isascii() and port.isdecimal() and int(port) <= _PORT_MAX):
        raise CommandError(f"invalid port: {port}")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_ADDRESS, int(port)))
        listener.listen()
    except OSError as err:
        listener.close()
        raise CommandError(f"{_ADDRESS}:{port}: {err.strerror}") from err
    return listener


def _serve(path: str, listener: socket.socket) -> None:
    from uvicorn import Config, Server  # noqa: PLC0415 - only here if it is installed

    from vmctl.web.access import Access  # noqa: PLC0415 - imports its libraries too
    from vmctl.web.server import application  # noqa: PLC0415 - the same

    port: int = listener.getsockname()[1]
    access = Access(port, time.monotonic)

    def link() -> str:
        return f"http://{_ADDRESS}:{port}{access.path}"

    def show_next_link() -> None:
        with suppress(OSError):  # a script may have read the first one alone
            os.write(1, f"{link()}\n".encode())

    config = Config(
        application(path, access, show_next_link),
        http="h11",
        ws="wsproto",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ws_max_size=_MESSAGE_MAX,
        limit_concurrency=_CONNECTIONS_MAX,
        timeout_graceful_shutdown=_LEAVE_S,
    )
    print("vmctl: each link logs a browser in once; ^C ends this", file=sys.stderr)
    print(link(), flush=True)
    Server(config).run(sockets=[listener])
