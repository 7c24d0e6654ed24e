"""Images in registries of containers: which blob of an OCI artefact is the disk.

The address is `oci://REGISTRY/NAME[:TAG][@DIGEST]`. The registry is asked by https, for a token
without a password where it wants one. Each document has the digest that named it, but that of a
tag, for which the registry's certificate vouches.

Source: OCI image specification 1.1 (index, manifest, descriptor); OCI distribution specification
1.1; RFC 6750 §2.1, §3.
"""

import hashlib
import os
import re
from typing import NamedTuple, NoReturn, TypeVar
from urllib.parse import urlencode

import msgspec

from vmctl.client import CommandError
from vmctl.images.digests import Digest, parse_digest
from vmctl.images.download import Limits, UnauthorizedError, check_url, fetch
from vmctl.images.reference import Reference

_DOCUMENT_MAX = 4 << 20
_TOKEN_MAX = 64 << 10
_ACCEPT = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        *("oci.image.manifest.v1", "oci.image.index.v1"),
        *("docker.distribution.manifest.v2", "docker.distribution.manifest.list.v2"),
    )
)
_TITLE = "org.opencontainers.image.title"
_DISKS = (".qcow2", ".img", ".raw")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_PARAMETER = re.compile(r'([a-z_]+)="([^"]*)"', re.ASCII | re.IGNORECASE)
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*", re.ASCII)


class Blob(NamedTuple):
    """A disk in a registry: a layer, as it is or in an archive."""

    url: str
    headers: dict[str, str]
    """What the registry wants to hear when it is asked for it."""
    digest: Digest
    size: int


class _Platform(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""


class _Descriptor(msgspec.Struct, frozen=True):
    digest: str
    size: int
    annotations: dict[str, str] | None = None
    platform: _Platform | None = None


class _Document(msgspec.Struct, frozen=True):
    """An index or a manifest."""

    manifests: list[_Descriptor] | None = None
    layers: list[_Descriptor] | None = None


class _Token(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""


_Answer = TypeVar("_Answer", _Document, _Token)


def find_disk(reference: Reference, limits: Limits) -> Blob:
    """Ask the registry which blob is the disk of this machine's architecture.

    Raises:
        CommandError: there is none, or the registry does not answer as it should.
    """
    registry = _Registry(reference, limits)
    wanted = reference.digest
    document = registry.document(f"{wanted.algorithm}:{wanted.hexadecimal}" if wanted else "")
    if document.manifests is not None and document.layers is None:
        chosen = _of_this_machine(reference, document.manifests)
        document = registry.document(chosen.digest)
    if document.layers is None or document.manifests is not None:
        raise CommandError(f"{reference.url}: no manifest of an image")
    layer = _disk_layer(reference, document.layers)
    if not 0 < layer.size <= limits.size:
        raise CommandError(
            f"{reference.url}: {layer.size} bytes are more than the limit of {limits.size}"
            if layer.size > 0
            else f"{reference.url}: an empty layer"
        )
    return registry.blob(layer)


def _of_this_machine(reference: Reference, manifests: list[_Descriptor]) -> _Descriptor:
    machine = os.uname().machine
    wanted = _Platform(_ARCHITECTURES.get(machine, machine), "linux")
    for one in manifests:
        if one.platform and (one.platform.architecture, one.platform.os) == (
            wanted.architecture,
            wanted.os,
        ):
            return one
    if len(manifests) == 1 and manifests[0].platform is None:
        return manifests[0]
    others = sorted({one.platform.architecture for one in manifests if one.platform})
    raise CommandError(
        f"{reference.url}: has no image for {wanted.architecture}"
        + (f", but for {', '.join(others[:8])}" if others else "")
    )


def _disk_layer(reference: Reference, layers: list[_Descriptor]) -> _Descriptor:
    """Return the only layer, or the only one that is titled like a disk."""
    if len(layers) == 1:
        return layers[0]
    titled = [one for one in layers if (one.annotations or {}).get(_TITLE, "").endswith(_DISKS)]
    if len(titled) == 1:
        return titled[0]
    raise CommandError(
        f"{reference.url}: {len(titled)} of its {len(layers)} layers are titled as disks, not one"
    )


class _Registry:
    """A registry, and the token that it wants."""

    def __init__(self, reference: Reference, limits: Limits) -> None:
        self._reference = reference
        self._limits = limits._replace(size=_DOCUMENT_MAX)
        self._headers: dict[str, str] = {}
        root = check_url(f"https://{reference.host}/", allows_http=False)
        self._base = f"{root}v2/{reference.name}/"

    def document(self, digest: str) -> _Document:
        """Return the index or manifest of a digest, or without one that of the tag.

        Raises:
            CommandError: there is none, or it has another digest.
        """
        url = f"{self._base}manifests/{digest or self._reference.tag}"
        wanted = parse_digest(digest) if digest else None
        data = self._fetch(url)
        if wanted and hashlib.new(wanted.algorithm, data).hexdigest() != wanted.hexadecimal:
            raise CommandError(f"{url}: wrong {wanted.algorithm} digest")
        return _decoded(url, data, _Document)

    def blob(self, layer: _Descriptor) -> Blob:
        """Return where a layer is.

        Raises:
            CommandError: its digest is none.
        """
        digest = parse_digest(layer.digest)
        url = f"{self._base}blobs/{digest.algorithm}:{digest.hexadecimal}"
        return Blob(url, self._headers, digest, layer.size)

    def _fetch(self, url: str) -> bytes:
        try:
            return fetch(url, self._limits, self._headers | {"Accept": _ACCEPT})
        except UnauthorizedError as err:
            if self._headers:
                raise
            self._headers = {"Authorization": f"Bearer {self._token(url, err.challenge)}"}
        return fetch(url, self._limits, self._headers | {"Accept": _ACCEPT})

    def _token(self, url: str, challenge: str) -> str:
        """Get a token for anybody, from the server that the registry names."""
        scheme, _, rest = challenge.partition(" ")
        said = {key.lower(): value for key, value in _PARAMETER.findall(rest)}
        if scheme.lower() != "bearer" or not said.get("realm"):
            raise CommandError(f"{url}: wants a password: only what anybody may read is pulled")
        query = {"scope": f"repository:{self._reference.name}:pull"} | {
            key: said[key] for key in ("service", "scope") if key in said
        }
        realm = check_url(said["realm"], allows_http=False)
        at = f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}"
        answer = _decoded(realm, fetch(at, self._limits._replace(size=_TOKEN_MAX)), _Token)
        token = answer.token or answer.access_token
        if not _TOKEN.fullmatch(token):
            raise CommandError(f"{realm}: gives no token")
        return token


def _decoded(url: str, data: bytes, kind: type[_Answer]) -> _Answer:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as err:
        _refuse(url, err)


def _refuse(url: str, err: Exception) -> NoReturn:
    raise CommandError(f"{url}: {' '.join(str(err).split())}") from None
