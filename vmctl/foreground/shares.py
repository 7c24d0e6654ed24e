"""Directories that `vmctl run` shares with its guest, by virtio-fs.

A process of its own serves each, with this user's rights to that directory and to nothing else. The
directory is opened once; each machine makes a new connection to a new process.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from vmd.config.shares import ShareError, ShareOption, check_tags, parse_share
from vmm_kvm.errors import SpecError
from vmm_kvm.virtio.vhost_user.fs import RemoteFsSpec

if TYPE_CHECKING:
    import socket

    from vmm_kvm.virtio.fs import VirtioFs


def open_shares(texts: Sequence[str], stack: ExitStack) -> Iterator[RemoteFsSpec]:
    """Open what `--share` names, in its order; `stack` closes it.

    Raises:
        SpecError: one cannot be understood or opened, or two have the same tag.
    """
    try:
        options = [parse_share(text) for text in texts]
        check_tags(options)
    except ShareError as err:
        raise SpecError(str(err)) from None
    for option in options:
        if option.is_server:
            from vmctl.foreground.disks import connect_server  # noqa: PLC0415 - few shares are

            connect = partial(connect_server, option.path)
            yield RemoteFsSpec(connect, os.fsencode(option.tag), f"share {option.tag}")
        else:
            yield share_directory(option, stack)


def share_directory(option: ShareOption, stack: ExitStack) -> RemoteFsSpec:
    """Open a directory to be shared; `stack` closes it.

    Raises:
        SpecError: it cannot be opened.
    """
    from vmm_kvm.fs.tree import open_root  # noqa: PLC0415 - not for servers

    try:
        root = open_root(option.path)
    except OSError as err:
        raise SpecError(f"share {option.path}: {err.strerror}") from err
    stack.callback(os.close, root)
    share = _ProcessShare(option, root)
    stack.callback(share.close)
    return RemoteFsSpec(share.connect, os.fsencode(option.tag), f"share {option.tag}")


class _ProcessShare:
    """A directory with a process of its own for each machine."""

    def __init__(self, option: ShareOption, root: int) -> None:
        self._option = option
        self._root = root
        self._close = ExitStack()

    def connect(self) -> "socket.socket":
        """Start the process, when the one before has ended.

        Raises:
            VmmError: it cannot serve the directory.
        """
        from vmm_kvm.virtio.vhost_user.process import (  # noqa: PLC0415 - as sockets are
            spawn_device_process,
        )

        self.close()
        process = self._close.enter_context(
            spawn_device_process(self._backend, f"share {self._option.tag}", (self._root,))
        )
        return process.connection

    def close(self) -> None:
        """Wait for the process to end; its connection is closed."""
        self._close.close()

    def _backend(self) -> "VirtioFs":
        """Confine this process, and make the device."""
        from vmctl.foreground.share_process import begin_share  # noqa: PLC0415 - in that process alone

        option = self._option
        return begin_share(self._root, os.fsencode(option.tag), is_writable=not option.is_read_only)
