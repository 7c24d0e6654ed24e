"""Users other than root, at root's daemon."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tests.system.vmd.daemon import Client, Daemon

USER = 65534
"""A user other than root: nobody."""


@contextmanager
def connection(vmd: Daemon, uid: int) -> Iterator[Client]:
    """Connect as a user; the kernel notes the user at that moment."""
    with being(uid):
        client = vmd.client()
    with client:
        yield client


@contextmanager
def being(uid: int) -> Iterator[None]:
    """Become another user, in no group but the user's own."""
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
