"""Pulling disks from registries of containers, good and bad: as artefacts, and in archives."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import ssl
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from tests.agents import wait_until
from tests.hostile_web import Answer, Asked, Connection, HostileWeb, certificate
from tests.unit.vmctl.test_image_pull import vmctl
from tests.vmctl_driver import VMCTL
from vmctl.images import pull as pulling
from vmctl.images.reference import parse_reference
from vmm_kvm.errors import SpecError

BOUND_S = 60
DISK = bytes(range(256)) * 4096
"""A raw disk."""
INDEX = "application/vnd.oci.image.index.v1+json"
LIMIT = 8 << 20


def sha256(data: bytes) -> str:
    """Return a digest as registries write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def archive(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    """Return a layer, whose last member is of a kind."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.pax_headers = {"comment": "x"}
            if (name, data) == members[-1]:
                member.type, member.linkname = kind, target
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


class Registry:
    """A registry with one artefact, `some/disk`, of two architectures and the tag `v1`."""

    def __init__(self, layer: bytes = DISK) -> None:
        """Keep a layer."""
        self.blobs: dict[str, bytes] = {}
        self.token = ""
        """That is wanted, if any."""
        self.url = ""
        self.realm = ""
        """Where to get it: the registry itself if it is empty."""
        self.storage = ""
        """Where blobs are, if not here."""
        self.challenge = ""
        self.answers: dict[str, Answer] = {}
        """Other answers, by the path's beginning."""
        self.put(layer)

    def put(self, *layers: bytes, titles: tuple[str, ...] = ()) -> None:
        """Make the artefact of layers."""
        described: list[dict[str, object]] = []
        for layer in layers:
            digest = sha256(layer)
            self.blobs[digest] = layer
            described.append({"mediaType": "any", "digest": digest, "size": len(layer)})
        for one, title in zip(described, titles, strict=False):
            one["annotations"] = {"org.opencontainers.image.title": title}
        self.manifest = json.dumps({"schemaVersion": 2, "layers": described}).encode()
        own = self._described(self.manifest, "amd64")
        other = self._described(b"{}", "arm64")
        attestation = self._described(b"[]", "unknown")
        self.index = json.dumps(
            {"schemaVersion": 2, "mediaType": INDEX, "manifests": [other, attestation, own]}
        ).encode()

    @staticmethod
    def _described(manifest: bytes, architecture: str) -> dict[str, object]:
        platform = {"architecture": architecture, "os": "linux"}
        return {"digest": sha256(manifest), "size": len(manifest), "platform": platform}

    def answer(self, asked: Asked, to: Connection) -> None:
        """Answer a request, as the specification of distribution has it."""
        for path, other in self.answers.items():
            if asked.path.startswith(path):
                other(asked, to)
                return
        if asked.path.startswith("/token?"):
            assert asked.path == "/token?scope=repository%3Asome%2Fdisk%3Apull&service=s"
            assert "Authorization" not in asked.headers
            to.answer(json.dumps({"token": self.token}).encode())
        elif self.token and asked.headers.get("Authorization") != f"Bearer {self.token}":
            own = f'Bearer realm="{self.realm or f"{self.url}/token"}",service="s"'
            told = f"WWW-Authenticate: {self.challenge or own}"
            to.answer(b"{}", "401 Unauthorized", told)
        elif asked.path == "/v2/some/disk/manifests/v1":
            assert INDEX in asked.headers["Accept"]
            to.answer(self.index)
        elif asked.path == f"/v2/some/disk/manifests/{sha256(self.manifest)}":
            to.answer(self.manifest)
        elif asked.path.startswith("/v2/some/disk/blobs/"):
            digest = asked.path.rpartition("/")[2]
            if self.storage:
                to.answer(b"", "307 Temporary", f"Location: {self.storage}/{digest}")
            else:
                ranged(self.blobs[digest], asked, to)
        else:
            to.answer(b"", "404 Not Found")


def ranged(data: bytes, asked: Asked, to: Connection) -> None:
    """Answer with data, or the requested part of it."""
    match = re.fullmatch(r"bytes=(\d+)-", asked.headers.get("Range", ""))
    if not match:
        to.answer(data)
        return
    told = f"Content-Range: bytes {match[1]}-{len(data) - 1}/{len(data)}"
    to.answer(data[int(match[1]) :], "206 Partial Content", told)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    """A server's certificate."""
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def store(
    tls: tuple[ssl.SSLContext, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A store of the test's own, whose directory is not made yet."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("VMCTL_IMAGES", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[1]))
    return tmp_path / "store"


@pytest.fixture
def web(store: Path, tls: tuple[ssl.SSLContext, Path]) -> Iterator[tuple[Registry, HostileWeb]]:
    """A registry that serves."""
    del store
    registry = Registry()
    with HostileWeb(registry.answer, tls[0]) as server:
        registry.url = server.url
        yield registry, server


def address(registry: Registry, what: str = "some/disk:v1") -> str:
    """Return the address of an artefact."""
    return f"oci://{registry.url.removeprefix('https://')}/{what}"


def pull(registry: Registry, what: str = "some/disk:v1", seconds: int = 50) -> tuple[int, str, str]:
    """Pull an artefact, in this process; returns status, output and errors."""
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        status = pulling.pull([address(registry, what)], limit=str(LIMIT), timeout=str(seconds))
    return status, output.getvalue(), errors.getvalue()


def left(store: Path) -> list[str]:
    """Return the files in a store."""
    return sorted(str(path.relative_to(store)) for path in store.rglob("*") if not path.is_dir())


def named(data: bytes) -> str:
    """Return the name of an image in the store."""
    return sha256(data).replace(":", "-")


# Right


def test_an_artefact(web: tuple[Registry, HostileWeb], store: Path) -> None:
    """The disk of this architecture is in the store under its digest; again, nothing is loaded."""
    registry, server = web
    assert pull(registry) == (
        0,
        f"{store}/{named(DISK)}\n",
        "vmctl: disk-v1: pulled, 1.0M: image:disk-v1\n",
    )
    assert (store / "names" / "disk-v1").read_bytes() == DISK
    asked = len(server.asked)
    status, _, errors = pull(registry)
    assert (status, errors) == (0, "vmctl: disk-v1: is there already, 1.0M: image:disk-v1\n")
    assert len(server.asked) == asked + 2
    assert left(store) == ["names/disk-v1", named(DISK)]


@pytest.mark.parametrize("packs", [False, True])
def test_an_archive(packs: bool, web: tuple[Registry, HostileWeb], store: Path) -> None:
    """The file in the folder disk of a container's layer is the image, with its own digest."""
    registry, server = web
    disk = DISK + bytes(1 << 20) + b"end"
    layer = archive(("./disk/", b""), ("etc/passwd", b"x"), ("disk/disk.img", disk))
    registry.put(gzip.compress(layer) if packs else layer)
    status, output, errors = pull(registry)
    assert (status, output, errors) == (
        0,
        f"{store}/{named(disk)}\n",
        "vmctl: disk-v1: pulled, 2.0M: image:disk-v1\n",
    )
    assert (store / named(disk)).read_bytes() == disk
    assert (store / named(disk)).stat().st_mode & 0o777 == 0o444
    assert (store / named(disk)).stat().st_blocks * 512 < len(disk)
    asked = len(server.asked)
    assert "is there already" in pull(registry)[2]
    assert len(server.asked) == asked + 2
    layer_link = f"layers/{sha256(registry.blobs.popitem()[1]).replace(':', '-')}"
    assert left(store) == [layer_link, "names/disk-v1", named(disk)]
    assert vmctl("image", "rm", "disk-v1")[0] == 0
    assert vmctl("image", "prune")[0] == 0
    assert left(store) == []


def test_two_layers_with_the_same_disk(web: tuple[Registry, HostileWeb], store: Path) -> None:
    """A disk that is there already, from another archive, is not replaced."""
    registry, _ = web
    layer = archive(("disk/a.qcow2", DISK))
    registry.put(layer)
    assert pull(registry)[0] == 0
    before = (store / named(DISK)).stat().st_ino
    registry.put(gzip.compress(layer))
    assert pull(registry)[0] == 0
    assert (store / named(DISK)).stat().st_ino == before
    assert not list((store / "partial").iterdir())


def test_by_digest(web: tuple[Registry, HostileWeb], store: Path) -> None:
    """A digest names an index or a manifest, and is checked; a tag beside it does not count."""
    registry, _ = web
    good = sha256(registry.manifest)
    assert pull(registry, f"some/disk:other@{good}")[0] == 0
    assert left(store) == ["names/disk-other", named(DISK)]
    path = f"/v2/some/disk/manifests/{good}"
    registry.answers[path] = lambda _, to: to.answer(registry.manifest + b" ")
    assert pull(registry, f"some/disk@{good}")[::2] == (
        1,
        f"vmctl: {registry.url}{path}: wrong sha256 digest\n",
    )
    assert pull(registry)[::2] == (1, f"vmctl: {registry.url}{path}: wrong sha256 digest\n")


def test_one_of_several_layers(web: tuple[Registry, HostileWeb], store: Path) -> None:
    """Of several layers the one that is titled as a disk is taken."""
    registry, _ = web
    registry.put(b"text", DISK, titles=("README", "disk.qcow2"))
    assert pull(registry)[0] == 0
    assert named(DISK) in left(store)


def test_a_token(web: tuple[Registry, HostileWeb], tls: tuple[ssl.SSLContext, Path]) -> None:
    """Anybody's token is fetched where the registry says, and no other server learns it."""
    registry, server = web
    registry.token = "some.token-1=="
    with HostileWeb(
        lambda asked, to: ranged(registry.blobs[asked.path[1:]], asked, to), tls[0]
    ) as storage:
        registry.storage = storage.url
        assert pull(registry)[0] == 0
        assert [one.headers.get("Authorization") for one in storage.asked] == [None]
    assert [one.path.rpartition("/")[2][:6] for one in server.asked] == [
        *("v1", "token?", "v1", "sha256", "sha256")
    ]


def test_resume(web: tuple[Registry, HostileWeb], store: Path) -> None:
    """The part of a layer that came before the connection broke is not downloaded again."""
    registry, server = web
    layer = archive(("disk/a.img", DISK))
    registry.put(layer)
    blobs = "/v2/some/disk/blobs/"
    registry.answers[blobs] = lambda _, to: to.answer(layer[:300_000], size=len(layer))
    status, _, errors = pull(registry)
    assert (status, errors.endswith(f"300000 of {len(layer)} bytes: pull it again\n")) == (1, True)
    assert left(store) == [f"partial/{named(layer)}"]
    registry.answers.clear()
    assert pull(registry)[0] == 0
    assert server.asked[-1].headers["Range"] == "bytes=300000-"
    assert left(store) == [f"layers/{named(layer)}", "names/disk-v1", named(DISK)]


def test_two_at_once(web: tuple[Registry, HostileWeb], store: Path) -> None:
    """One of two pulls of a layer waits for the other, and it is downloaded once."""
    registry, server = web
    layer = archive(("disk/a.img", DISK))
    registry.put(layer)
    may_end = threading.Event()

    def held(_asked: Asked, to: Connection) -> None:
        to.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(layer)}\r\n\r\n".encode())
        to.send(layer[:100_000])
        may_end.wait(BOUND_S)
        to.send(layer[100_000:])

    registry.answers["/v2/some/disk/blobs/"] = held
    words: list[str | Path] = [VMCTL, "image", "pull", address(registry)]
    with subprocess.Popen([*words, "a"], stderr=subprocess.PIPE, text=True) as first:
        wait_until(lambda: any("/blobs/" in one.path for one in server.asked))
        with subprocess.Popen([*words, "b"], stderr=subprocess.PIPE, text=True) as second:
            assert second.stderr
            assert second.stderr.readline() == "vmctl: b: another pull is on\n"
            may_end.set()
            assert [first.wait(BOUND_S), second.wait(BOUND_S)] == [0, 0]
    assert sum("/blobs/" in one.path for one in server.asked) == 1
    assert left(store) == [f"layers/{named(layer)}", "names/a", "names/b", named(DISK)]


# Wrong


def _endless(_asked: Asked, to: Connection) -> None:
    to.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not to.closing.is_set():
        to.send(b"10000\r\n" + bytes(65536) + b"\r\n")


def _silent(_asked: Asked, to: Connection) -> None:
    to.closing.wait(BOUND_S)


def _document(**fields: object) -> Answer:
    return lambda _, to: to.answer(json.dumps(fields).encode())


TAG, BLOBS, TOKEN = "/v2/some/disk/manifests/v1", "/v2/some/disk/blobs/", "/token"
DEEP = b"[" * 4_000_000
LAYER = {"digest": sha256(DISK), "size": len(DISK)}

BAD_ANSWERS: dict[str, tuple[str, Answer, str]] = {
    "no artefact": (TAG, lambda _, to: to.answer(b"", "404 Not Found"), "not found"),
    "an endless manifest": (TAG, _endless, "more than 4194304 bytes"),
    "a silent registry": (TAG, _silent, "no progress in 1 s"),
    "no JSON": (TAG, lambda _, to: to.answer(b"\xff<html>"), "JSON is malformed"),
    "deep JSON": (TAG, lambda _, to: to.answer(b'{"x":' + DEEP), "/v1: "),
    "a list": (TAG, lambda _, to: to.answer(b"[]"), "Expected `object`, got `array`"),
    "neither": (TAG, _document(schemaVersion=1), "no manifest of an image"),
    "both": (TAG, _document(manifests=[], layers=[LAYER]), "no manifest of an image"),
    "no layers": (TAG, _document(layers=[]), "0 of its 0 layers are titled as disks"),
    "two layers": (TAG, _document(layers=[LAYER, LAYER]), "0 of its 2 layers are titled"),
    "no size": (TAG, _document(layers=[{"digest": ""}]), "missing required field `size`"),
    "a negative size": (TAG, _document(layers=[LAYER | {"size": -1}]), "an empty layer"),
    "a large size": (
        TAG,
        _document(layers=[LAYER | {"size": 1 << 62}]),
        "than the limit of 8388608",
    ),
    "a path as digest": (
        *(TAG, _document(layers=[LAYER | {"digest": "sha256:../../../x"}])),
        "invalid digest: sha256:../../../x",
    ),
    "an index in an index": (
        *(TAG, _document(manifests=[{"digest": sha256(b'{"manifests":[]}'), "size": 1}])),
        "not found",
    ),
    "other architectures": (
        TAG,
        _document(manifests=[LAYER | {"platform": {"architecture": "arm\x1b[2J", "os": "linux"}}]),
        "has no image for amd64, but for arm\\x1b[2J",
    ),
    "an endless layer": (BLOBS, _endless, "goes on behind its end: the limit of 1048576 bytes"),
    "another layer": (BLOBS, lambda _, to: to.answer(DISK[::-1]), "wrong sha256 digest: removed"),
    "an empty layer": (BLOBS, lambda _, to: to.answer(b""), "an empty file"),
    "a loop": (
        *(BLOBS, lambda _, to: to.answer(b"", "307 To", f"Location: {BLOBS}x")),
        "more than 5 redirections",
    ),
    "a file of this host": (
        *(BLOBS, lambda _, to: to.answer(b"", "307 To", "Location: file:///etc/shadow")),
        "file:///etc/shadow: not an address of http or https",
    ),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_bad_registries(case: str, web: tuple[Registry, HostileWeb], store: Path) -> None:
    """Each ends with one line and status 1; no image is left."""
    registry, _ = web
    path, answer, told = BAD_ANSWERS[case]
    registry.answers[path] = answer
    status, output, errors = pull(registry, seconds=1 if answer is _silent else 50)
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert told in errors
    kept = [f"partial/{named(DISK)}"] if case == "an endless layer" else []
    assert left(store) == kept


BAD_TOKENS: dict[str, tuple[str, bytes, str]] = {
    "a password": ('Basic realm="https://127.0.0.1:1/"', b"", "wants a password"),
    "no realm": ("Bearer service=x", b"", "wants a password"),
    "by http": ('Bearer realm="http://127.0.0.1:1/t"', b"", "http://127.0.0.1:1/t: use https"),
    "a file": ('Bearer realm="file:///etc/x"', b"", "file:///etc/x: not an address of http"),
    "no token": ("", b"{}", "gives no token"),
    "a header": ("", json.dumps({"token": "x\r\nHost: y"}).encode(), "gives no token"),
    "a number": ("", b'{"token":1}', "Expected `str`, got `int`"),
    "a long one": ("", b" " * 70_000, "more than 65536 bytes"),
    "a wrong one": ("", b'{"access_token":"x"}', "status 401 Unauthorized"),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_bad_tokens(case: str, web: tuple[Registry, HostileWeb], store: Path) -> None:
    """A registry or token server that asks for something else gets one line."""
    registry, _ = web
    registry.token = "token"
    registry.challenge, answer, told = BAD_TOKENS[case]
    registry.answers[TOKEN] = lambda _, to: to.answer(answer)
    status, output, errors = pull(registry)
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert told in errors
    assert left(store) == []


def _qcow2_on(base: bytes) -> bytes:
    header = b"QFI\xfb" + (2).to_bytes(4, "big") + (512).to_bytes(8, "big")
    header += len(base).to_bytes(4, "big") + (16).to_bytes(4, "big") + (1 << 20).to_bytes(8, "big")
    header += bytes(4) + (1).to_bytes(4, "big") + (3 << 16).to_bytes(8, "big")
    header += (1 << 16).to_bytes(8, "big") + (1).to_bytes(4, "big") + bytes(4) + bytes(8)
    return (header.ljust(512, b"\0") + base).ljust(5 << 16, b"\0")


WHOLE = archive(("disk/a.img", DISK))
BAD_LAYERS: dict[str, tuple[bytes, str]] = {
    "nothing in it": (archive(("etc/passwd", b"x")), "no file in a folder disk: removed"),
    "deeper": (archive(("disk/a/b", b"x")), "no file in a folder disk: removed"),
    "two": (archive(("disk/a", b"x"), ("disk/b", b"x")), "more than one file in its folder disk"),
    "empty": (archive(("disk/a", b"")), "an empty disk: removed"),
    "out of it": (archive(("disk/../../x", b"x")), "leads out of the tree: removed"),
    "absolute": (archive(("/disk/x", b"x")), "leads out of the tree: removed"),
    "a link": (
        archive(("disk/a", b""), kind=tarfile.SYMTYPE, target="/etc/shadow"),
        "no file in a folder disk: removed",
    ),
    "a hard link": (
        archive(("disk/a", b""), kind=tarfile.LNKTYPE, target="x"),
        "neither file, directory nor link",
    ),
    "a device": (
        archive(("disk/a", b""), kind=tarfile.BLKTYPE),
        "neither file, directory nor link",
    ),
    "a base": (archive(("disk/a", _qcow2_on(b"/etc/shadow"))), "names a base image, a file of"),
    "a base without an archive": (_qcow2_on(b"/etc/shadow"), "names a base image, a file of"),
    "truncated": (WHOLE[:500_000], "the stream ends too early"),
    "truncated gzip": (gzip.compress(WHOLE)[:1000], "a broken archive: "),
    "gzip of no archive": (gzip.compress(DISK), "tar: not a tar stream"),
    "broken gzip": (gzip.compress(WHOLE)[:100] + bytes(1000), "a broken archive: "),
    "a bomb": (
        gzip.compress(archive(("disk/a", bytes(20 << 20)))),
        "its archive has more than the limit of 8388608 bytes: removed",
    ),
    "a bomb before it": (
        gzip.compress(archive(("x", bytes(20 << 20)), ("disk/a", b"x"))),
        "its archive has more than the limit of 8388608 bytes: removed",
    ),
    "a bomb behind it": (
        gzip.compress(archive(("disk/a", b"x")) + bytes(20 << 20)),
        "its archive has more than the limit of 8388608 bytes: removed",
    ),
    "many files": (
        archive(*((f"x{number}", b"") for number in range(4097))),
        "more than 4096 files in its archive: removed",
    ),
    "a long header": (
        archive((f"disk/{'x' * 70_000}", b"x")),
        "a name is too long",
    ),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(1000), "a layer compressed by zstd, not by gzip"),
    "another format": (b"KDMV" + bytes(1020), "images are not supported"),
}


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_bad_layers(case: str, web: tuple[Registry, HostileWeb], store: Path) -> None:
    """Each ends with one line and status 1; nothing is left."""
    registry, _ = web
    layer, told = BAD_LAYERS[case]
    registry.put(layer)
    status, output, errors = pull(registry)
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert told in errors
    assert left(store) == []


def test_full_disk(web: tuple[Registry, HostileWeb], tmp_path: Path) -> None:
    """If the disk is full when a layer is unpacked, nothing is left."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    registry, _ = web
    noise = os.urandom(200_000) * 5  # which gzip's window does not find again
    registry.put(gzip.compress(archive(("disk/a", DISK + noise[:1]))))
    small = tmp_path / "small"
    small.mkdir()
    script = (
        'mount -t tmpfs -o size=600k none "$1" && export VMCTL_IMAGES="$1"/store;'
        ' "$VMCTL" image pull "$2"; echo $?; find "$VMCTL_IMAGES" -type f'
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", small, address(registry)],
        env={**os.environ, "VMCTL": str(VMCTL)},
        capture_output=True,
        text=True,
        check=False,
        timeout=BOUND_S,
    )
    assert done.stdout == "1\n"
    assert done.stderr == f"vmctl: {small}/store: No space left on device\n"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        *(
            (url, f"{url}: not an address such as oci://registry/name:tag")
            for url in (
                *("oci://", "oci://host", "oci://host/", "oci:///name", "oci://host/../x"),
                *("oci://host/Name", "oci://host/a//b", "oci://host/a?b", "oci://user@host/a"),
                *("oci://host/a:", "oci://host/a:../x", "oci://host/a@", "oci://host/a@sha256:"),
                *(f"oci://host/{'a' * 256}", "oci://host/a:b@x/y"),
            )
        ),
        ("oci://host/a@sha256:00", "invalid digest: sha256:00"),
        ("oci://host/a@md5:00", "invalid digest: md5:00"),
        (f"oci://host/{'a' * 65}", "invalid image name: "),
        ("oci://127.0.0.1:99999/a", "not an address of http or https"),
    ],
)
def test_what_makes_no_sense(url: str, told: str, store: Path) -> None:
    """A malformed address is one line, and nothing is asked or made."""
    status, output, errors = vmctl("image", "pull", url)
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert told in errors
    assert left(store) == []


def test_digests_of_the_command_line(store: Path) -> None:
    """The digest of an artefact stands in its address, not beside it."""
    for words in (("--digest", f"sha256:{'0' * 64}"), ("--sums", "x")):
        assert vmctl("image", "pull", *words, "oci://host/a") == (
            *(1, ""),
            "vmctl: oci://host/a: its digest stands behind it: @sha256:...\n",
        )
    assert left(store) == []


def test_names() -> None:
    """An image is named by the last part of the artefact's name, and its tag."""
    names = {"a/b/disk": "disk", "disk:latest": "disk", "disk:V1.2": "disk-v1.2"}
    for what, name in names.items():
        assert parse_reference(f"oci://[::1]:5000/{what}").image_name() == name
    with pytest.raises(SpecError):
        parse_reference("oci://host/a/")
