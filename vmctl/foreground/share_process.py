"""The process that serves a shared directory to a VM of `vmctl run`."""

import os

from vmd.confine.sandbox import set_title
from vmd.device.share import make_share
from vmm_kvm.virtio.fs import VirtioFs


def begin_share(root: int, tag: bytes, *, is_writable: bool) -> VirtioFs:
    """Confine this process to the directory with descriptor `root`, and return its device.

    Raises:
        VmmError: it cannot be confined.
        OSError: there is no /proc.
    """
    set_title("share")
    with open(os.devnull, "r+b", buffering=0) as null:  # noqa: PTH123 - not the user's terminal
        for number in (0, 1):
            os.dup2(null.fileno(), number)
    return make_share(root, tag, is_writable=is_writable)
