"""The process that serves a shared directory: confined to it before the guest says a word."""

import os
import resource

from vmd.confine.confinements import share_confinement
from vmd.confine.landlock import Subtree
from vmd.confine.sandbox import SandboxError, confine, keep_capabilities, set_title
from vmm_kvm.errors import VmmError
from vmm_kvm.fs.server import DESCRIPTORS, FuseServer
from vmm_kvm.fs.tree import Tree
from vmm_kvm.virtio.fs import VirtioFs

# Access to files as root has it; CAP_DAC_OVERRIDE, _DAC_READ_SEARCH, _FOWNER, _FSETID.
_CAPABILITIES = frozenset({1, 2, 3, 4})


def make_share(root: int, tag: bytes, *, is_writable: bool) -> VirtioFs:
    """Confine this process to the directory with descriptor `root`, and return its device.

    Raises:
        VmmError: it cannot be confined.
        OSError: there is no /proc.
    """
    set_title("share")
    with open(os.devnull, "r+b", buffering=0) as null:  # noqa: PTH123 - not the user's terminal
        for number in (0, 1):
            os.dup2(null.fileno(), number)
    os.umask(0)  # the guest has its own
    limit = min(DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    tree = Tree(root)
    server = FuseServer(tree, is_writable=is_writable)
    try:
        if os.geteuid() == 0:
            keep_capabilities(_CAPABILITIES)
        confine(
            share_confinement(tree.own, is_writable=is_writable), None, Subtree(root, is_writable)
        )
    except SandboxError as err:
        raise VmmError(f"cannot confine the process of a share: {err}") from err
    return VirtioFs(server, tag)
