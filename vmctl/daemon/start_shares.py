"""Shared directories of `vmctl start`: from `--share` to the request's fields, and open."""

import os
from collections.abc import Sequence

from vmctl.client import CommandError, Fields
from vmctl.daemon.starting import path_of, shown
from vmd.config.shares import ShareError, check_tags, parse_share
from vmm_kvm.limits import SHARES_MAX


def open_shares(texts: Sequence[str], fds: list[int]) -> list[Fields]:
    """Return the fields of shares; descriptors of the directories are added to `fds`.

    Raises:
        CommandError: one is not understood, or no directory, or two have the same tag.
    """
    try:
        shares = [parse_share(text) for text in texts]
        check_tags(shares)
    except ShareError as err:
        raise CommandError(str(err)) from None
    if len(shares) > SHARES_MAX:
        raise CommandError("too many shares")
    found = []
    for text, share in zip(texts, shares, strict=True):
        if share.is_server:
            raise CommandError(f"invalid share: {text}: only for 'vmctl run' and vm.conf")
        path = path_of(share.path, "share")
        try:
            fds.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as err:
            raise CommandError(f"cannot open share '{path}': {err.strerror}") from err
        fields: Fields = {"path": shown(path), "tag": share.tag, "directory": len(fds) - 1}
        found.append({**fields, "is_read_only": share.is_read_only})
    return found
