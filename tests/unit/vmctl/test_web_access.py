"""Admission of requests to `vmctl web`."""

from __future__ import annotations

import pytest

from vmctl.web.access import LOGIN_PATH, SESSION_S, SESSIONS_MAX, Access

PORT = 8006
HOST = ("host", f"127.0.0.1:{PORT}")


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def access() -> tuple[Access, Clock]:
    """Return the rules, and their clock."""
    clock = Clock()
    return Access(PORT, clock), clock


def log_in(rules: Access) -> dict[str, str]:
    """Use the link; returns the cookies of the browser."""
    session = rules.log_in(rules.path.partition("=")[2])
    assert session
    return {rules.cookie: session}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([HOST], None),
        ([("host", "localhost:8006")], None),
        ([("host", "localhost:1234"), ("origin", "http://localhost:1234")], None),  # ssh -L
        ([("host", "localhost")], None),
        ([HOST, ("origin", f"http://127.0.0.1:{PORT}"), ("sec-fetch-site", "same-origin")], None),
        ([HOST, ("sec-fetch-site", "none")], None),
        ([], 403),
        ([("host", "")], 403),
        ([("host", "evil.example")], 403),
        ([("host", "evil.example:8006")], 403),
        ([("host", "127.0.0.1.evil.example")], 403),
        ([("host", "127.0.0.1:8006\n")], 403),
        ([("host", "127.0.0.2:8006")], 403),
        ([("host", "LOCALHOST@evil")], 403),
        ([HOST, ("origin", "http://evil.example")], 403),
        ([HOST, ("origin", "null")], 403),
        ([HOST, ("origin", f"http://localhost:{PORT}")], 403),
        ([HOST, ("origin", f"https://127.0.0.1:{PORT}")], 403),
        ([HOST, ("origin", "http://127.0.0.1:9999")], 403),
        ([HOST, ("sec-fetch-site", "cross-site")], 403),
        ([HOST, ("sec-fetch-site", "same-site")], 403),
        ([HOST, HOST], 400),
        ([HOST, ("origin", f"http://127.0.0.1:{PORT}"), ("origin", "http://evil.example")], 400),
    ],
)
def test_hosts_and_origins(headers: list[tuple[str, str]], status: int | None) -> None:
    """With a cookie too, only requests to this host's two names, from its own pages, are let in."""
    rules, _ = access()
    refusal = rules.refusal("/api/status", headers, log_in(rules))
    assert (refusal.status if refusal else None) == status


def test_cookies() -> None:
    """Without a cookie, or with one of another process or port, a request is refused."""
    rules, _ = access()
    other, _ = access()
    cookies = log_in(rules)
    value = cookies[rules.cookie]
    for wrong in (
        {},
        {rules.cookie: ""},
        {rules.cookie: value[:-1]},
        {rules.cookie: "\udcff"},
        {"vmctl-web-8007": value},
        log_in(other),
    ):
        refusal = rules.refusal("/", [HOST], wrong)
        assert refusal
        assert refusal.status == 401
    assert rules.refusal("/", [HOST], cookies) is None


def test_a_link_works_once() -> None:
    """A link logs in one browser; the next one has another link, and both stay logged in."""
    rules, _ = access()
    token = rules.path.partition("=")[2]
    assert rules.refusal(LOGIN_PATH, [HOST, ("sec-fetch-site", "cross-site")], {}) is None
    assert rules.refusal(LOGIN_PATH, [("host", "evil.example")], {})
    for wrong in ("", token[:-1], token + "x", "ä"):
        assert rules.log_in(wrong) is None
    first = rules.log_in(token)
    assert first
    assert rules.log_in(token) is None
    second = log_in(rules)
    for cookies in ({rules.cookie: first}, second):
        assert rules.refusal("/", [HOST], cookies) is None


def test_sessions_end() -> None:
    """A session ends after its time, or when there are too many later ones."""
    rules, clock = access()
    first = log_in(rules)
    clock.now = SESSION_S - 1
    assert rules.refusal("/", [HOST], first) is None
    clock.now = SESSION_S
    assert rules.refusal("/", [HOST], first)
    second = log_in(rules)
    for _ in range(SESSIONS_MAX - 1):
        log_in(rules)
    assert rules.refusal("/", [HOST], second) is None
    log_in(rules)
    assert rules.refusal("/", [HOST], second)
