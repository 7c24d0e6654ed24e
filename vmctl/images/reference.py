"""Addresses in registries of containers: `oci://REGISTRY/NAME[:TAG][@DIGEST]`.

Source: OCI distribution specification 1.1 "Pulling manifests".
"""

import re
from typing import NamedTuple

from vmctl.images.digests import Digest, parse_digest
from vmm_kvm.errors import SpecError

_HOST = r"(?P<host>(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?)"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_TAG = r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?"
_DIGEST = r"(?:@(?P<digest>[a-z0-9]+:[0-9A-Fa-f]+))?"
_REFERENCE = re.compile(rf"oci://{_HOST}/(?P<name>{_PART}(?:/{_PART})*){_TAG}{_DIGEST}", re.ASCII)
_NAME_MAX = 255
_DEFAULT_TAG = "latest"


class Reference(NamedTuple):
    """An address of an artefact."""

    url: str
    """As the user wrote it, for messages."""
    host: str
    name: str
    tag: str
    digest: Digest | None
    """Of the index or manifest; counts instead of the tag."""

    def image_name(self) -> str:
        """Return the name that the image gets in the store: with the tag, unless it is latest."""
        last = self.name.rpartition("/")[2]
        return last if self.tag == _DEFAULT_TAG else f"{last}-{self.tag.lower()}"


def parse_reference(url: str) -> Reference:
    """Read an address.

    Raises:
        CommandError: its digest is none.
        SpecError: it names no artefact.
    """
    match = _REFERENCE.fullmatch(url)
    if not match or len(match["name"]) > _NAME_MAX:
        raise SpecError(f"{url}: not an address such as oci://registry/name:tag")
    digest = parse_digest(match["digest"]) if match["digest"] else None
    return Reference(url, match["host"], match["name"], match["tag"] or _DEFAULT_TAG, digest)
