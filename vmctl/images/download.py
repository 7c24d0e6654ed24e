"""Downloads by HTTP, from servers that are not trusted.

Addresses are https; plain http only for data whose digest is known from elsewhere. Redirections are
followed five times, and never from https to http. Certificates are verified; the proxies and
certificates of the environment (`https_proxy`, `SSL_CERT_FILE`) count.

The time without progress is bounded, whatever the server does: an alarm ends it. So this is for the
main thread of a command.
"""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse, IncompleteRead
from types import FrameType, MappingProxyType
from typing import NamedTuple
from urllib.error import URLError
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

from vmctl.client import CommandError
from vmm_kvm.version import version

_REDIRECTIONS_MAX = 5
_PIECE = 256 << 10
_PROGRESS = 64 << 10
"""So many bytes have to come before the time is over."""
_MOVED = {301, 302, 303, 307, 308}
_OK, _PARTIAL, _UNAUTHORIZED, _NOT_FOUND, _BEHIND_END = 200, 206, 401, 404, 416
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_SAFE = "%/:=&?~#+!$,;'@()*[]"
"""Characters of a redirection's address besides letters and digits; as of RFC 3986."""


class DownloadError(CommandError):
    """There is nothing to be had; `str()` is one line."""


class MissingError(DownloadError):
    """The server has no such file."""


class UnauthorizedError(DownloadError):
    """The server wants to know who asks."""

    def __init__(self, text: str, challenge: str) -> None:
        """Keep what the server says of how it may learn that."""
        super().__init__(text)
        self.challenge = challenge


class Limits(NamedTuple):
    """How long, and how much."""

    seconds: float
    """Without progress."""
    size: int


class Body(NamedTuple):
    """A file that a server has begun to send."""

    response: HTTPResponse
    start: int
    """At which byte."""
    size: int | None
    """Of the whole file, if the server says it."""


@contextmanager
def patience(seconds: float) -> Iterator[Callable[[], None]]:
    """Raise TimeoutError in the block after so many seconds.

    They are counted anew when the block calls what it gets.
    """

    def expire(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    def again() -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)

    before = signal.signal(signal.SIGALRM, expire)
    try:
        again()
        yield again
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_url(url: str, *, allows_http: bool) -> str:
    """Return an address that can be asked.

    Raises:
        DownloadError: it cannot, or only without knowing who answers.
    """
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        has_host = False
    if not has_host or parts.scheme not in {"http", "https"}:
        raise DownloadError(f"{url}: not an address of http or https")
    if parts.scheme == "http" and not allows_http:
        raise DownloadError(f"{url}: use https, or say the digest: --digest sha256:...")
    return quote(url, safe=_SAFE)


@contextmanager
def opened(
    url: str, seconds: float, start: int = 0, headers: Mapping[str, str] = _NO_HEADERS
) -> Iterator[Body]:
    """Ask for a file, from byte `start` on if the server can.

    A redirection to another server does not get the `Authorization` of `headers`.

    Raises:
        UnauthorizedError: the server wants to know who asks.
        MissingError: the server has none.
        DownloadError: it answers anything else, or not.
    """
    opener = OpenerDirector()
    for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler()):
        opener.add_handler(handler)
    sent = {"User-Agent": f"vmctl/{version()}", "Accept-Encoding": "identity", **headers}
    if start:
        sent["Range"] = f"bytes={start}-"
    at = url
    for _ in range(_REDIRECTIONS_MAX + 1):
        with _explained(at):
            request = Request(at, headers=sent)  # noqa: S310 - check_url has looked at it
            response: HTTPResponse = opener.open(request, timeout=seconds)
        with response:
            if response.status in _MOVED:
                at = _next(at, response.headers.get("Location", ""))
                if urlsplit(at)[:2] != urlsplit(url)[:2]:
                    sent.pop("Authorization", None)
                continue
            yield _body(at, response, start)
            return
    raise DownloadError(f"{url}: more than {_REDIRECTIONS_MAX} redirections")


def _next(url: str, location: str) -> str:
    if not location:
        raise DownloadError(f"{url}: a redirection to nowhere")
    try:
        new = urljoin(url, location)
    except ValueError:
        raise DownloadError(f"{url}: a redirection to {location}") from None
    return check_url(new, allows_http=urlsplit(url).scheme == "http")


def _body(url: str, response: HTTPResponse, start: int) -> Body:
    status = response.status
    if status == _NOT_FOUND:
        raise MissingError(f"{url}: not found")
    if status == _OK:
        return Body(response, 0, _number(response.headers.get("Content-Length", "")))
    if status == _PARTIAL and start:
        unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
        part, _, size = rest.partition("/")
        if unit == "bytes" and _number(part.partition("-")[0]) == start:
            return Body(response, start, _number(size))
        raise DownloadError(f"{url}: the server sends another part than was asked for")
    if status == _BEHIND_END and start:
        return Body(response, start, start)
    told = f"{url}: status {status} {response.reason}"
    if status == _UNAUTHORIZED:
        raise UnauthorizedError(told, response.headers.get("WWW-Authenticate", ""))
    raise DownloadError(told)


def _number(text: str) -> int | None:
    """Return a number of bytes; None if it is none, or none that can be."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn an exception of the libraries into one line.

    Raises:
        DownloadError: with that line.
        TimeoutError: the time is over.
    """
    try:
        yield
    except TimeoutError:
        raise
    except URLError as err:
        if isinstance(err.reason, TimeoutError):
            raise TimeoutError from None
        raise DownloadError(f"{url}: {_reason(err.reason)}") from None
    except (OSError, HTTPException, ValueError) as err:
        raise DownloadError(f"{url}: {_reason(err)}") from None


def _reason(err: BaseException | str) -> str:
    certificate = getattr(err, "verify_message", "")  # of ssl.SSLCertVerificationError
    if certificate:
        return f"its certificate: {certificate}"
    if isinstance(err, OSError) and err.strerror:
        return err.strerror
    text = " ".join(str(err).split())
    return text or f"no HTTP ({type(err).__name__})"


def fetch(url: str, limits: Limits, headers: Mapping[str, str] = _NO_HEADERS) -> bytes:
    """Return a short file; `headers` as `opened` has them.

    Raises:
        UnauthorizedError: the server wants to know who asks.
        MissingError: the server has none.
        DownloadError: it cannot be had, or is not short.
    """
    try:
        with (
            patience(limits.seconds),
            opened(url, limits.seconds, 0, headers) as body,
            _explained(url),
        ):
            data = bytearray()
            while piece := _read(url, body):
                data += piece
                if len(data) > limits.size:
                    raise DownloadError(f"{url}: more than {limits.size} bytes")
    except TimeoutError:
        raise _expired(url, limits) from None
    if body.size is not None and len(data) != body.size:
        raise DownloadError(f"{url}: ended after {len(data)} of {body.size} bytes")
    return bytes(data)


def _read(url: str, body: Body) -> bytes:
    """Return received bytes, or none at the end."""
    try:
        return body.response.read1(_PIECE)
    except IncompleteRead:
        if body.size is None:
            raise DownloadError(f"{url}: the connection ended early: pull it again") from None
        return b""


def _expired(url: str, limits: Limits) -> DownloadError:
    return DownloadError(f"{url}: no progress in {limits.seconds:g} s")


class Sink(NamedTuple):
    """The target of a download."""

    fd: int
    """A file, of which the first bytes are there."""
    restart: Callable[[], None]
    """Begin at its start: the server sends everything."""
    take: Callable[[bytes], None]
    """Add bytes."""
    begin: Callable[[int, int | None], None]
    """From this byte on, of so many, it begins."""


def download(
    url: str, limits: Limits, start: int, sink: Sink, headers: Mapping[str, str] = _NO_HEADERS
) -> None:
    """Get a file, from its byte `start` on if the server can; received bytes stay after a failure.

    `headers` are as `opened` has them.

    Raises:
        MissingError: the server has none.
        DownloadError: it ends early, takes too long, or makes no progress.
        OSError: of the sink.
    """
    done = start
    try:
        with (
            patience(limits.seconds) as again,
            opened(url, limits.seconds, start, headers) as body,
        ):
            if body.start != start:
                sink.restart()
                done = 0
            _check_size(url, body.size, limits)
            sink.begin(done, body.size)
            if body.size == done:
                return
            awaited = done + _PROGRESS
            while True:
                with _explained(url):
                    piece = _read(url, body)
                if not piece:
                    break
                done += len(piece)
                if done > (limits.size if body.size is None else body.size):
                    raise DownloadError(f"{url}: goes on behind its end: {_bound(body, limits)}")
                sink.take(piece)
                if done >= awaited:
                    awaited = done + _PROGRESS
                    again()
    except TimeoutError:
        raise _expired(url, limits) from None
    if body.size is not None and done < body.size:
        raise DownloadError(f"{url}: ended after {done} of {body.size} bytes: pull it again")


def _check_size(url: str, size: int | None, limits: Limits) -> None:
    if size is not None and size > limits.size:
        raise DownloadError(f"{url}: {size} bytes are more than the limit of {limits.size}")


def _bound(body: Body, limits: Limits) -> str:
    return f"{body.size} bytes" if body.size is not None else f"the limit of {limits.size} bytes"


def free_space(directory: str) -> int:
    """Return how many bytes a directory has room for."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize
