"""Sources of images: the table of names that `vmctl image pull` knows.

Each line is a name, the address of the image, and that of the list of digests which its
distribution publishes beside it. Users add lines of the same form in a file of their own.
"""

import os
import re
from typing import NamedTuple

from vmm_kvm.errors import SpecError

_NAMES = """
debian-12     https://cloud.debian.org/images/cloud/bookworm/latest/debian-12-genericcloud-amd64.qcow2  SHA512SUMS
debian-13     https://cloud.debian.org/images/cloud/trixie/latest/debian-13-genericcloud-amd64.qcow2    SHA512SUMS
debian-sid    https://cloud.debian.org/images/cloud/sid/daily/latest/debian-sid-genericcloud-amd64-daily.qcow2  SHA512SUMS
ubuntu-22.04  https://cloud-images.ubuntu.com/releases/jammy/release/ubuntu-22.04-server-cloudimg-amd64.img  SHA256SUMS
ubuntu-24.04  https://cloud-images.ubuntu.com/releases/noble/release/ubuntu-24.04-server-cloudimg-amd64.img  SHA256SUMS
"""  # noqa: E501 - an address is a line

OCI = "oci://"
"""In front of an address in a registry of containers."""
LISTS = ("SHA512SUMS", "SHA256SUMS")
"""The usual names of lists of digests."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_EXTENSIONS = (".qcow2", ".img", ".raw", ".iso")
_FILE_MAX = 1 << 20


class Source(NamedTuple):
    """An image that can be pulled."""

    name: str
    url: str
    sums: str = ""
    """The list of digests: an address, or relative to that of the image; unknown if empty."""


def check_name(name: str) -> str:
    """Return a name that can be that of an image in the store.

    Raises:
        SpecError: it cannot: it would not be one word, or lead elsewhere.
    """
    if not _NAME.fullmatch(name):
        raise SpecError(f"invalid image name: {name}: lower case letters, digits and . _ -")
    return name


def user_table() -> str:
    """Return where the user's own names are."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    base = base if os.path.isabs(base) else os.path.expanduser("~/.config")
    return os.path.join(base, "vmm-kvm", "images")


def sources() -> dict[str, Source]:
    """Return what can be pulled by name; the user's names come before ours.

    Raises:
        SpecError: the user's file cannot be read, or understood.
    """
    path = user_table()
    found = _read(_NAMES, "")
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            found |= _read(file.read(_FILE_MAX), path)
    except FileNotFoundError:
        pass
    except OSError as err:
        raise SpecError(f"{path}: {err.strerror}") from err
    return found


def _read(text: str, path: str) -> dict[str, Source]:
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if not 2 <= len(words) <= 3 or not _NAME.fullmatch(words[0]):
            raise SpecError(f"{path}:{number}: not a name, an address and a list of digests")
        found[words[0]] = Source(*words)
    return found


def source_of(word: str, name: str = "") -> Source:
    """Return the source that a word of the command line names: of the table, or an address.

    Raises:
        SpecError: the name is unknown, or none follows from the address.
    """
    if name:
        check_name(name)
    if word.startswith(OCI):
        from vmctl.images.reference import parse_reference  # noqa: PLC0415 - only for such

        return Source(name or check_name(parse_reference(word).image_name()), word)
    if "://" in word:
        return Source(name or _name_in(word), word)
    known = sources()
    if word not in known:
        raise SpecError(f"{word}: unknown image ({', '.join(known)}, or an address)")
    return known[word]._replace(name=name or word)


def file_in(url: str) -> str:
    """Return the name of the file at an address, as a list of digests has it."""
    from urllib.parse import unquote, urlsplit  # noqa: PLC0415 - only with an address

    return unquote(urlsplit(url).path.rpartition("/")[2])


def _name_in(url: str) -> str:
    name = file_in(url).lower()
    for extension in _EXTENSIONS:
        name = name.removesuffix(extension)
    if not _NAME.fullmatch(name):
        raise SpecError(f"{url}: no name follows from it: say one behind it")
    return name
