"""Shared directories as a user writes them on a command line.

directory:tag[:ro|:rw]
vhost-user:socket:tag
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from vmm_kvm.limits import SHARE_TAG_MAX

VHOST_USER = "vhost-user:"
"""Begins the path of a server's socket."""
ACCESS = {"ro": True, "rw": False}
"""Words for whether a share is read-only."""


class ShareError(ValueError):
    """A share that cannot be understood; the message is one line."""


class ShareOption(NamedTuple):
    """One share, as it was asked for."""

    path: str
    """Of a directory, or of a server's socket."""
    tag: str
    """By which the guest mounts it."""
    is_read_only: bool = False
    is_server: bool = False
    """Whether the path is a vhost-user server's."""


def parse_share(text: str) -> ShareOption:
    """Read a share.

    Raises:
        ShareError: the directory or the tag is missing, or something does not fit.
    """
    is_server = text.startswith(VHOST_USER)
    place, is_read_only = text.removeprefix(VHOST_USER), False
    before, _, word = place.rpartition(":")
    has_access = word in ACCESS
    if has_access:
        place, is_read_only = before, ACCESS[word]
    path, colon, tag = place.rpartition(":")
    if not colon or not path:
        raise ShareError(f"invalid share: {text}: not directory:tag")
    if has_access and is_server:
        raise ShareError(f"invalid share: {text}: what may be written is up to its server")
    try:
        check_tag(tag)
    except ShareError as err:
        raise ShareError(f"invalid share: {text}: {err}") from None
    return ShareOption(path, tag, is_read_only, is_server)


def check_tag(tag: str) -> None:
    """Refuse what is no tag.

    Raises:
        ShareError: it is none.
    """
    if not 0 < len(os.fsencode(tag)) <= SHARE_TAG_MAX or "\0" in tag:
        raise ShareError(f"the tag has 1 to {SHARE_TAG_MAX} bytes")


def check_tags(shares: Sequence[ShareOption]) -> None:
    """Refuse one tag of two shares.

    Raises:
        ShareError: there is one; the message names it.
    """
    tags = [share.tag for share in shares]
    for tag in tags:
        if tags.count(tag) > 1:
            raise ShareError(f"two shares have the tag {tag}")
