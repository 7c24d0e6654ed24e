"""Admission of requests: those of a browser that was logged in by a link, for this very host.

Any user of this host can connect to the port, any page in the user's browser can send requests to
it, and a page of a foreign name can resolve that name to 127.0.0.1. So a request needs a cookie
that only a link gives, which works once; the `Host` that the browser was told; and no sign that
another origin has sent it.
"""

import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

LOGIN_PATH = "/login"
SESSION_S = 12 * 3600.0
"""A cookie is good for so long."""
SESSIONS_MAX = 16
"""The oldest session ends when there are more."""

_HOST = re.compile(r"(?:127\.0\.0\.1|localhost)(?::[0-9]{1,5})?")
_LOOKED_AT = {"host", "origin", "sec-fetch-site"}
_FROM_HERE = {"same-origin", "none"}
_TOKEN_BYTES = 32


class Refusal(NamedTuple):
    """Why a request is not let in."""

    status: int
    message: str


class Access:
    """The link that logs in next, and the sessions that links have begun."""

    def __init__(self, port: int, clock: Callable[[], float]) -> None:
        """Make the first link; `clock` counts seconds."""
        # A browser sends a cookie to every port of a host: the name says whose it is.
        self.cookie = f"vmctl-web-{port}"
        self._clock = clock
        self._token = secrets.token_urlsafe(_TOKEN_BYTES)
        self._sessions: OrderedDict[str, float] = OrderedDict()

    @property
    def path(self) -> str:
        """The path, and the query, of the link that logs in next."""
        return f"{LOGIN_PATH}?token={self._token}"

    def log_in(self, token: str) -> str | None:
        """Use up the link that has this token; returns the cookie's value, or None if none has."""
        if not secrets.compare_digest(token.encode(), self._token.encode()):
            return None
        self._token = secrets.token_urlsafe(_TOKEN_BYTES)
        session = secrets.token_urlsafe(_TOKEN_BYTES)
        self._sessions[session] = self._clock() + SESSION_S
        while len(self._sessions) > SESSIONS_MAX:
            self._sessions.popitem(last=False)
        return session

    def refusal(
        self, path: str, headers: Iterable[tuple[str, str]], cookies: Mapping[str, str]
    ) -> Refusal | None:
        """Return why a request is refused, which may be for a WebSocket; None if it is let in.

        The names of `headers` are in lower case.
        """
        told: dict[str, str] = {}
        for name, value in headers:
            if name in _LOOKED_AT and name in told:
                return Refusal(400, f"there are two headers {name}")
            told[name] = value
        host = told.get("host", "")
        if not _HOST.fullmatch(host):
            return Refusal(403, "this server is called 127.0.0.1 or localhost")
        if path == LOGIN_PATH:  # the link may have been clicked anywhere
            return None
        if told.get("origin", f"http://{host}") != f"http://{host}":
            return Refusal(403, "a page of another origin has sent this")
        if told.get("sec-fetch-site", "none") not in _FROM_HERE:
            return Refusal(403, "another site has sent this")
        if not self._is_session(cookies.get(self.cookie, "")):
            return Refusal(401, "open the link that vmctl web has printed last")
        return None

    def _is_session(self, value: str) -> bool:
        now = self._clock()
        known = False
        for session, end in self._sessions.items():
            is_it = secrets.compare_digest(session.encode(), value.encode(errors="replace"))
            known |= is_it and now < end
        return known
