"""Pulling images from servers with every fault, without leftovers.

Except the received part, with which the next pull continues.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import re
import select
import signal
import ssl
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.agents import wait_until
from tests.hostile_web import Answer, Asked, Connection, HostileWeb, certificate
from tests.vmctl_driver import VMCTL
from vmctl.images.sources import LISTS, check_name, sources
from vmm_kvm.errors import SpecError

BOUND_S = 60
IMAGE = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(IMAGE).hexdigest()
SHA512 = hashlib.sha512(IMAGE).hexdigest()
STORED = f"sha256-{SHA256}"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own, whose directory is not made yet."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("VMCTL_IMAGES", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "store"


def vmctl(*words: str | Path) -> tuple[int, str, str]:
    """Run a command; returns status, output and errors."""
    done = subprocess.run(
        [VMCTL, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=BOUND_S,
    )
    return done.returncode, done.stdout, done.stderr


def pull(url: str, *words: str | Path, digest: str = f"sha256:{SHA256}") -> tuple[int, str, str]:
    """Pull an image whose digest is known."""
    return vmctl("image", "pull", "--timeout", "50", "--digest", digest, url, *words)


def left(store: Path) -> list[str]:
    """Return the files in a store."""
    return sorted(str(path.relative_to(store)) for path in store.rglob("*") if not path.is_dir())


def whole(_asked: Asked, to: Connection) -> None:
    """Answer with the image."""
    to.answer(IMAGE)


def ranged(asked: Asked, to: Connection) -> None:
    """Answer with the image, or the requested part of it."""
    match = re.fullmatch(r"bytes=(\d+)-", asked.headers.get("Range", ""))
    if not match:
        to.answer(IMAGE)
    elif int(match[1]) >= len(IMAGE):
        to.answer(b"", "416 Range Not Satisfiable")
    else:
        start = int(match[1])
        told = f"Content-Range: bytes {start}-{len(IMAGE) - 1}/{len(IMAGE)}"
        to.answer(IMAGE[start:], "206 Partial Content", told)


def test_pull(store: Path) -> None:
    """The image is in the store under its digest, read-only, with the name of its file."""
    with HostileWeb(whole) as web:
        status, output, errors = pull(f"{web.url}/some/Disk-1.qcow2")
    assert (status, output, errors) == (
        0,
        f"{store}/{STORED}\n",
        "vmctl: disk-1: pulled, 1.0M: image:disk-1\n",
    )
    assert left(store) == ["names/disk-1", STORED]
    assert (store / STORED).read_bytes() == (store / "names" / "disk-1").read_bytes() == IMAGE
    assert (store / STORED).stat().st_mode & 0o777 == 0o444


def test_progress(store: Path) -> None:
    """A terminal shows a bar, which is gone in the end; the result is in the pipe alone."""
    sent = threading.Event()

    def slowly(_asked: Asked, to: Connection) -> None:
        to.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(IMAGE)}\r\n\r\n".encode())
        to.send(IMAGE[: len(IMAGE) // 2])
        sent.wait(BOUND_S)
        to.send(IMAGE[len(IMAGE) // 2 :])

    with HostileWeb(slowly) as web, terminal() as (master, slave):
        words = ["image", "pull", "--digest", f"sha256:{SHA256}", f"{web.url}/a.img"]
        with subprocess.Popen(
            [VMCTL, *words],
            stdin=slave,
            stdout=subprocess.PIPE,
            stderr=slave,
            env={**os.environ, "TERM": "xterm"},
        ) as process:
            shown = b""
            while b"0.5/1.0 MiB" not in shown:
                assert select.select([master], [], [], BOUND_S)[0], shown
                shown += os.read(master, 65536)
            sent.set()
            assert process.communicate(timeout=BOUND_S)[0] == f"{store}/{STORED}\n".encode()
            assert process.returncode == 0


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Yield both sides of a terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    try:
        yield master, slave
    finally:
        os.close(master)
        os.close(slave)


def test_pull_again(store: Path) -> None:
    """An image in the store is not downloaded again, and may get another name."""
    with HostileWeb(whole) as web:
        pull(f"{web.url}/a.img")
        status, _, errors = pull(f"{web.url}/a.img", "second")
        assert (status, len(web.asked)) == (0, 1)
    assert errors == "vmctl: second: is there already, 1.0M: image:second\n"
    assert left(store) == ["names/a", "names/second", STORED]


def _endless(_asked: Asked, to: Connection) -> None:
    to.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not to.closing.is_set():
        to.send(b"10000\r\n" + bytes(65536) + b"\r\n")


def _longer(_asked: Asked, to: Connection) -> None:
    to.answer(IMAGE + b"more", size=len(IMAGE) - 1)


def _continued(_asked: Asked, to: Connection) -> None:
    while not to.closing.is_set():
        to.send(b"HTTP/1.1 100 Continue\r\n\r\n")


def _silent(_asked: Asked, to: Connection) -> None:
    to.closing.wait(BOUND_S)


def _slow(_asked: Asked, to: Connection) -> None:
    to.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1048576\r\n\r\n")
    while not to.closing.wait(0.2):
        to.send(b"x")


def _with_base(_asked: Asked, to: Connection) -> None:
    to.answer(HOSTILE)


def _qcow2_on(base: bytes) -> bytes:
    """Return the header of an overlay."""
    header = b"QFI\xfb" + (2).to_bytes(4, "big") + (512).to_bytes(8, "big")
    header += len(base).to_bytes(4, "big") + (16).to_bytes(4, "big") + (1 << 20).to_bytes(8, "big")
    header += bytes(4) + (1).to_bytes(4, "big") + (3 << 16).to_bytes(8, "big")
    header += (1 << 16).to_bytes(8, "big") + (1).to_bytes(4, "big") + bytes(4) + bytes(8)
    return (header.ljust(512, b"\0") + base).ljust(5 << 16, b"\0")


HOSTILE = _qcow2_on(b"/etc/shadow")

BAD: dict[str, tuple[Answer, str | tuple[str, str]]] = {
    "wrong digest": (lambda _, to: to.answer(IMAGE[::-1]), "wrong sha256 digest: removed"),
    "longer than announced": (_longer, "wrong sha256 digest: removed"),
    "empty": (lambda _, to: to.answer(b""), "an empty file"),
    "endless": (_endless, "goes on behind its end: the limit of 8388608 bytes"),
    "endless by announcement": (
        lambda _, to: to.answer(b"", size=1 << 60),
        "1152921504606846976 bytes are more than the limit of 8388608",
    ),
    "no HTTP": (lambda _, to: to.send(b"\x00\xff" * 100 + b"\r\n"), ""),
    "nothing": (lambda _, to: to.send(b""), "Remote end closed connection without response"),
    "endless headers": (
        lambda _, to: to.send(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000),
        "got more than 100 headers",
    ),
    # The second since Python 3.14.
    "endless continues": (_continued, ("no progress in 1 s", "more than 100 interim responses")),
    "silence": (_silent, "no progress in 1 s"),
    "a byte now and then": (_slow, "no progress in 1 s"),
    "missing": (lambda _, to: to.answer(b"", "404 Not Found"), "not found"),
    "failing": (lambda _, to: to.answer(b"", "500 \x1b[2J"), "status 500 \\x1b[2J"),
    "loop": (
        lambda _, to: to.answer(b"", "302 Found", "Location: /again"),
        "more than 5 redirections",
    ),
    "redirection to a file": (
        lambda _, to: to.answer(b"", "302 Found", "Location: file:///etc/passwd"),
        "file:///etc/passwd: not an address of http or https",
    ),
    "redirection to nowhere": (
        lambda _, to: to.answer(b"", "301 Moved Permanently"),
        "a redirection to nowhere",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_servers(case: str, store: Path) -> None:
    """Each ends with one line and status 1; no image or part of one is left."""
    answer, one_or_more = BAD[case]
    told = (one_or_more,) if isinstance(one_or_more, str) else one_or_more
    seconds = "1" if "no progress in 1 s" in told else "50"
    with HostileWeb(answer) as web:
        status, output, errors = vmctl(
            *("image", "pull", "--timeout", seconds, "--limit", "8M"),
            *("--digest", f"sha256:{SHA256}", f"{web.url}/a.img"),
        )
    assert (status, output) == (1, "")
    assert errors.startswith("vmctl: file:" if "file:" in told[0] else f"vmctl: {web.url}/")
    assert errors.endswith(tuple(f"{one}\n" for one in told))
    assert errors.count("\n") == 1
    kept = ["endless", "a byte now and then"]
    assert left(store) == ([f"partial/{STORED}"] if case in kept else [])


def test_an_image_that_names_a_file_of_this_host(store: Path) -> None:
    """An overlay is refused: it would show its guest the file that it names as its base."""
    with HostileWeb(_with_base) as web:
        digest = hashlib.sha256(HOSTILE).hexdigest()
        status, _, errors = pull(f"{web.url}/a.qcow2", digest=f"sha256:{digest}")
    assert (status, errors) == (
        1,
        "vmctl: a: it names a base image, a file of this host: removed\n",
    )
    assert left(store) == []


def test_resume(store: Path) -> None:
    """The part that came before the connection broke is not downloaded again."""

    def broken(_asked: Asked, to: Connection) -> None:
        to.answer(IMAGE[:300_000], size=len(IMAGE))

    with HostileWeb(broken) as web:
        status, _, errors = pull(f"{web.url}/a.img")
    assert (status, errors) == (
        1,
        f"vmctl: {web.url}/a.img: ended after 300000 of 1048576 bytes: pull it again\n",
    )
    assert left(store) == [f"partial/{STORED}"]
    with HostileWeb(ranged) as web:
        assert pull(f"{web.url}/a.img")[0] == 0
        assert web.asked[0].headers["Range"] == "bytes=300000-"
    assert (store / STORED).read_bytes() == IMAGE
    assert left(store) == ["names/a", STORED]


@pytest.mark.parametrize(
    ("part", "answer"),
    [
        (IMAGE[:1000], whole),  # a server without ranges
        (IMAGE, ranged),  # complete, but without its name
        (b"other" * 100, whole),
    ],
)
def test_resume_with_what_is_there(part: bytes, answer: Answer, store: Path) -> None:
    """With any part, and any server, the image is right in the end."""
    (store / "partial").mkdir(parents=True)
    (store / "partial" / STORED).write_bytes(part)
    with HostileWeb(answer) as web:
        assert pull(f"{web.url}/a.img")[0] == 0
    assert (store / STORED).read_bytes() == IMAGE


def test_resume_with_something_else(store: Path) -> None:
    """A part of another file is found by the digest; the next pull starts anew."""
    (store / "partial").mkdir(parents=True)
    (store / "partial" / STORED).write_bytes(b"other" * 100)
    with HostileWeb(ranged) as web:
        status, _, errors = pull(f"{web.url}/a.img")
        assert (status, errors) == (1, f"vmctl: {web.url}/a.img: wrong sha256 digest: removed\n")
        assert pull(f"{web.url}/a.img")[0] == 0


def test_another_part_than_asked_for(store: Path) -> None:
    """Another part than requested is refused, and the former part stays."""

    def shifted(_asked: Asked, to: Connection) -> None:
        told = f"Content-Range: bytes 5-{len(IMAGE) - 1}/{len(IMAGE)}"
        to.answer(IMAGE[5:], "206 Partial Content", told)

    (store / "partial").mkdir(parents=True)
    (store / "partial" / STORED).write_bytes(IMAGE[:1000])
    with HostileWeb(shifted) as web:
        status, _, errors = pull(f"{web.url}/a.img")
    assert (status, errors.endswith("sends another part than was asked for\n")) == (1, True)
    assert (store / "partial" / STORED).read_bytes() == IMAGE[:1000]


def test_two_at_once(store: Path) -> None:
    """One of two pulls of an image waits for the other, and the server is asked once."""
    may_end = threading.Event()

    def held(_asked: Asked, to: Connection) -> None:
        to.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(IMAGE)}\r\n\r\n".encode())
        to.send(IMAGE[:100_000])
        may_end.wait(BOUND_S)
        to.send(IMAGE[100_000:])

    words: list[str | Path] = [VMCTL, "image", "pull", "--digest", f"sha256:{SHA256}"]
    with HostileWeb(held) as web:
        first = subprocess.Popen([*words, f"{web.url}/a.img"], stderr=subprocess.PIPE, text=True)
        wait_until(lambda: bool(web.asked))
        second = subprocess.Popen([*words, f"{web.url}/b.img"], stderr=subprocess.PIPE, text=True)
        assert second.stderr
        assert second.stderr.readline() == "vmctl: b: another pull is on\n"
        may_end.set()
        assert [one.wait(BOUND_S) for one in (first, second)] == [0, 0]
        for one in (first, second):
            assert one.stderr
            one.stderr.close()
        assert len(web.asked) == 1
    assert left(store) == ["names/a", "names/b", STORED]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed(number: int, store: Path) -> None:
    """A killed pull leaves its part, unlocked: prune removes it, or a pull continues."""

    def held(_asked: Asked, to: Connection) -> None:
        to.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(IMAGE)}\r\n\r\n".encode())
        to.send(IMAGE[:500_000])
        to.closing.wait(BOUND_S)

    partial = store / "partial" / STORED
    with HostileWeb(held) as web:
        words: list[str | Path] = [
            VMCTL,
            "image",
            "pull",
            "--digest",
            f"sha256:{SHA256}",
            f"{web.url}/a.img",
        ]
        with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
            wait_until(lambda: partial.exists() and partial.stat().st_size == 500_000)
            assert vmctl("image", "prune") == (0, "0B freed\n", "")
            process.send_signal(number)
            assert process.communicate(timeout=BOUND_S)[1] == b""
            assert process.returncode == -number
    assert left(store) == [f"partial/{STORED}"]
    assert vmctl("image", "prune") == (0, "488K freed\n", "")
    assert left(store) == []


def test_full_disk(tmp_path: Path, store: Path) -> None:
    """An image that does not fit is refused in advance, or removed when the disk is full."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    del store
    small = tmp_path / "small"
    small.mkdir()
    script = (
        'mount -t tmpfs -o size=600k none "$1" && export VMCTL_IMAGES="$1"/store && shift'
        ' && for url; do "$VMCTL" image pull --digest "$DIGEST" "$url"; echo $?; done;'
        ' find "$VMCTL_IMAGES" -type f'
    )

    def answer(asked: Asked, to: Connection) -> None:
        if asked.path == "/announced.img":
            to.answer(IMAGE)
        else:
            to.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + IMAGE)

    with HostileWeb(answer) as web:
        done = subprocess.run(
            [
                *("unshare", "--mount", "sh", "-c", script, "sh", small),
                *(f"{web.url}/announced.img", f"{web.url}/not.img"),
            ],
            env={**os.environ, "VMCTL": str(VMCTL), "DIGEST": f"sha256:{SHA256}"},
            capture_output=True,
            text=True,
            check=False,
            timeout=BOUND_S,
        )
    assert done.stdout == "1\n1\n"
    assert done.stderr.splitlines() == [
        f"vmctl: {small}/store: 1.0M do not fit: 600K are free",
        f"vmctl: {small}/store: No space left on device",
    ]


def test_offline(store: Path) -> None:
    """If no server answers, that is one line."""
    with HostileWeb(whole) as web:
        url = web.url
    assert pull(f"{url}/a.img") == (1, "", f"vmctl: {url}/a.img: Connection refused\n")
    assert left(store) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["../../etc/x"], "../../etc/x: unknown image (debian-12, "),
        (["debian"], "debian: unknown image (debian-12, "),
        (["http://127.0.0.1:1/a.img"], "http://127.0.0.1:1/a.img: use https, or say"),
        (["https://127.0.0.1:1/a.img", "../x"], "invalid image name: ../x: "),
        (["https://127.0.0.1:1/a.img", ".x"], "invalid image name: .x: "),
        (["https://127.0.0.1:1/a%2f..%2f.."], "no name follows from it: say one behind it"),
        (["https://127.0.0.1:1/"], "no name follows from it: say one behind it"),
        (["ftp://127.0.0.1/a.img"], "ftp://127.0.0.1/a.img: not an address of http or https"),
        (["https://[::1/a.img", "a"], "not an address of http or https"),
        (["--digest", "md5:00", "https://127.0.0.1/a.img"], "invalid digest: md5:00: "),
        (["--digest", "sha256:xx", "https://127.0.0.1/a.img"], "invalid digest: sha256:xx: "),
        (["--limit", "x", "https://127.0.0.1/a.img"], "invalid limit: x: "),
        (["--timeout", "x", "https://127.0.0.1/a.img"], "invalid time-out: x: "),
        (["--digest", "x", "--sums", "y", "debian-13"], "--digest and --sums: use one"),
    ],
)
def test_what_makes_no_sense(words: list[str], told: str, store: Path) -> None:
    """A malformed request is one line, and nothing is asked or made."""
    status, output, errors = vmctl("image", "pull", *words)
    assert (status, output) == (1, "")
    assert told in errors
    assert errors.count("\n") == 1
    assert left(store) == []


# Lists of digests, by https


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    """A server's certificate."""
    return certificate(tmp_path_factory.mktemp("tls"))


class Site:
    """A distribution's server: an image, and a list of digests."""

    def __init__(self) -> None:
        """Serve the right list."""
        self.name = "SHA512SUMS"
        self.text = f"{'0' * 128}  other.qcow2\n{SHA512}  web.qcow2\n".encode()
        self.image = IMAGE

    def answer(self, asked: Asked, to: Connection) -> None:
        """Answer a request."""
        if asked.path.endswith("web.qcow2"):
            to.answer(self.image)
        elif asked.path == f"/cloud/{self.name}":
            to.answer(self.text)
        else:
            to.answer(b"", "404 Not Found")


@pytest.fixture
def site(
    tls: tuple[ssl.SSLContext, Path], store: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Site, HostileWeb]]:
    """A distribution's server, with a known certificate and a name in the table."""
    context, path = tls
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    site = Site()
    with HostileWeb(site.answer, context) as web:
        table = Path(os.environ["XDG_CONFIG_HOME"]) / "vmm-kvm" / "images"
        table.parent.mkdir(parents=True)
        table.write_text(f"# ours\nweb {web.url}/cloud/web.qcow2 {site.name}\n")
        yield site, web
    del store


def test_a_name_of_the_users_table(site: tuple[Site, HostileWeb], store: Path) -> None:
    """The image has the digest of the list, and a newer one takes over its name."""
    server, web = site
    assert vmctl("image", "pull", "web")[:2] == (0, f"{store}/sha512-{SHA512}\n")
    assert vmctl("image", "pull", "web")[0] == 0
    assert [one.path for one in web.asked] == [
        *("/cloud/SHA512SUMS", "/cloud/web.qcow2", "/cloud/SHA512SUMS")
    ]
    server.image = IMAGE * 2
    new = hashlib.sha512(server.image).hexdigest()
    server.text = f"{new} *web.qcow2\n".encode()
    assert vmctl("image", "pull", "web")[0] == 0
    listed = json.loads(vmctl("image", "list", "--json")[1])
    assert [(one["digest"], one["names"]) for one in listed] == [
        (f"sha512-{new}", ["web"]),
        (f"sha512-{SHA512}", []),
    ]
    assert vmctl("image", "prune") == (0, "1.0M freed\n", "")
    assert left(store) == ["names/web", f"sha512-{new}"]


def test_an_address_with_a_list_beside_it(site: tuple[Site, HostileWeb], store: Path) -> None:
    """The lists are tried by their usual names."""
    server, web = site
    server.name, server.text = LISTS[1], f"{SHA256} *web.qcow2\n".encode()
    assert vmctl("image", "pull", f"{web.url}/cloud/web.qcow2", "mine")[0] == 0
    assert left(store) == ["names/mine", STORED]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "has no digest of web.qcow2"),
        (b"\xff" * 1000, "has no digest of web.qcow2"),
        (b"0123  web.qcow2\n", "has no digest of web.qcow2"),
        (b"\xff" * 128 + b"  web.qcow2\n", "has no digest of web.qcow2"),
        (b"0" * 128 + b"  ../web.qcow2\n", "has no digest of web.qcow2"),
        (b"0" * 128 + b"  web.qcow2\n", "wrong sha512 digest: removed"),
        (b"0" * (5 << 20), "more than 4194304 bytes"),
    ],
)
def test_bad_lists(text: bytes, told: str, site: tuple[Site, HostileWeb], store: Path) -> None:
    """A bad list is one line, and nothing stays."""
    site[0].text = text
    status, _, errors = vmctl("image", "pull", "web")
    assert (status, errors.count("\n")) == (1, 1)
    assert errors.endswith(f"{told}\n")
    assert left(store) == []


def test_no_list(site: tuple[Site, HostileWeb]) -> None:
    """Nothing is pulled without a digest."""
    server, web = site
    server.name = "none"
    status, _, errors = vmctl("image", "pull", f"{web.url}/cloud/web.qcow2")
    assert status == 1
    assert errors.endswith(
        "there is no SHA512SUMS or SHA256SUMS beside it: say --digest, or --sums address\n"
    )


def test_an_unknown_certificate(
    site: tuple[Site, HostileWeb], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with an unknown certificate is refused."""
    monkeypatch.delenv("SSL_CERT_FILE")
    status, _, errors = vmctl("image", "pull", "web")
    assert (status, errors) == (
        1,
        f"vmctl: {site[1].url}/cloud/SHA512SUMS: its certificate: self-signed certificate\n",
    )


def test_no_way_from_https_to_http(
    tls: tuple[ssl.SSLContext, Path], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A redirection may not leave https."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))
    with HostileWeb(whole) as plain:

        def elsewhere(_asked: Asked, to: Connection) -> None:
            to.answer(b"", "302 Found", f"Location: {plain.url}/a.img")

        with HostileWeb(elsewhere, tls[0]) as web:
            status, _, errors = pull(f"{web.url}/a.img")
        assert (status, plain.asked) == (1, [])
    assert errors.startswith(f"vmctl: {plain.url}/a.img: use https")
    assert left(store) == []


def test_a_bad_table(store: Path) -> None:
    """A mistake in the user's own table is reported with its place."""
    del store
    table = Path(os.environ["XDG_CONFIG_HOME"]) / "vmm-kvm" / "images"
    table.parent.mkdir(parents=True)
    table.write_text("one https://host/x SUMS\n\ntwo\n")
    status, _, errors = vmctl("image", "pull", "one")
    assert status == 1
    assert errors == f"vmctl: {table}:3: not a name, an address and a list of digests\n"


def test_names_we_know(store: Path) -> None:
    """Each known name has an image at an https address, and a list."""
    del store
    for name, source in sources().items():
        assert check_name(name) == source.name
        assert source.url.startswith("https://")
        assert source.sums in LISTS
    with pytest.raises(SpecError):
        check_name("Upper")


# Use


@pytest.fixture
def pulled(store: Path, tmp_path: Path) -> Path:
    """A qcow2 image in the store, as `web`."""
    disk = tmp_path / "disk.qcow2"
    vmctl("create", "-s", "4M", disk)
    data = disk.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    with HostileWeb(lambda _, to: to.answer(data)) as web:
        assert pull(f"{web.url}/web.qcow2", digest=f"sha256:{digest}")[0] == 0
    return store / f"sha256-{digest}"


def test_list(pulled: Path) -> None:
    """The list has all images."""
    lines = vmctl("image", "list")[1].splitlines()
    assert lines[0].split() == ["SIZE", "PULLED", "DIGEST", "NAME"]
    assert lines[1].split()[2:] == [pulled.name[:19], "web"]
    assert "format:" in vmctl("image", "info", "image:web")[1]
    assert vmctl("image", "resize", "image:web", "8M")[::2] == (
        1,
        "vmctl: image:web: images of the store are not changed\n",
    )


def test_overlays_keep_their_image(pulled: Path, tmp_path: Path) -> None:
    """An image is not removed while it is the base of a disk."""
    overlay = tmp_path / "web.qcow2"
    assert vmctl("create", "-b", "image:web", overlay)[0] == 0
    assert f"{pulled}" in vmctl("image", "info", overlay)[1]
    stays = f"vmctl: web: stays: {overlay} is an overlay on it\n"
    assert vmctl("image", "rm", "web") == (1, "", stays)
    overlay.unlink()
    assert vmctl("image", "rm", "web") == (0, "", "")
    assert not pulled.exists()
    assert vmctl("image", "rm", "web") == (1, "", "vmctl: web: there is no such image\n")


def test_an_image_in_use_stays(pulled: Path) -> None:
    """An image that a VM has locked is not removed."""
    with pulled.open("rb") as file:
        record = b"".join(  # a reader's byte of QEMU's convention
            (
                fcntl.F_RDLCK.to_bytes(2, "little"),
                (0).to_bytes(6, "little"),
                (201).to_bytes(8, "little"),
                (1).to_bytes(8, "little"),
                bytes(8),
            )
        )
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, record)
        assert vmctl("image", "rm", "web") == (1, "", "vmctl: web: stays: it is in use\n")
    assert pulled.exists()


def test_disks_by_name(pulled: Path) -> None:
    """A disk of `start` or `run` can be an image of the store, but read-only."""
    del pulled
    for verb in ("start", "run"):
        options = ["-b", "/none"] if verb == "run" else []
        status, _, errors = vmctl(verb, *options, "-d", "image:web", "vm")
        assert status == 1
        assert "image:web: images of the store are not written: add ,snapshot or ,ro" in errors
        status, _, errors = vmctl(verb, *options, "-d", "image:none,ro", "vm")
        assert status == 1
        assert "image:none: there is no such image: 'vmctl image pull none' gets it\n" in errors
        status, _, errors = vmctl(verb, *options, "-d", "image:../x,ro", "vm")
        assert (status, "invalid image name: ../x" in errors) == (1, True)
