"""A shared directory's process: it serves one tree to one VM, and can reach nothing else.

The zygote does not fork it: a process of the zygote's has no files for good, and the user of a VM
may read none of its owner's. So it is a child of the parent's, and has the user whose directory it
is. It opens that with this user's rights, and is confined before the guest says a word.
"""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from vmd.confine.confinements import share_confinement
from vmd.confine.landlock import Subtree
from vmd.confine.sandbox import (
    Identity,
    SandboxError,
    client_identity,
    confine,
    held_capabilities,
    keep_capabilities,
    set_title,
)
from vmd.shared import log as logging
from vmd.shared.privsep import join_cgroup
from vmd.shared.shares import ShareOrder
from vmd.wire.parcels import opened
from vmm_kvm.errors import SpecError, VmmError
from vmm_kvm.fs.server import DESCRIPTORS, FuseServer
from vmm_kvm.fs.tree import Tree, open_root
from vmm_kvm.virtio.fs import VirtioFs
from vmm_kvm.virtio.vhost_user.process import serve
from vmm_kvm.virtio.vhost_user.readiness import tell_failure, tell_ready

ROOT_CAPABILITIES = frozenset({1, 2, 3, 4})
"""Access to files as root has it; CAP_DAC_OVERRIDE, _DAC_READ_SEARCH, _FOWNER, _FSETID."""


def run(share: ShareOrder) -> None:
    """Serve a directory until its VM is gone."""
    option = share.option
    set_title(f"share/{share.vm}")
    logging.set_title(f"vm/{share.vm}: share {option.tag}")
    vm = socket.socket(fileno=share.socket)
    try:
        if share.cgroup is not None:
            join_cgroup(share.cgroup)
        identity = None if share.uid is None else client_identity(share.uid)
        with nullcontext() if identity is None else _rights_of(identity):
            root = _open_root(option.path, share.directory)
        tag = os.fsencode(option.tag)
        backend = make_share(root, tag, is_writable=not option.is_read_only, identity=identity)
    except (VmmError, OSError) as err:
        why = err.strerror if isinstance(err, OSError) else str(err)
        tell_failure(share.status, f"share {option.path}: {why or err}")
        return
    if tell_ready(share.status):
        serve(vm, backend)


def _open_root(path: str, directory: int | None) -> int:
    if directory is not None:
        (fd,) = opened([directory])
        try:
            return open_root(fd)
        finally:
            os.close(fd)
    if not path.startswith("/"):
        raise SpecError("not an absolute path")
    return open_root(path)


@contextmanager
def _rights_of(identity: Identity) -> Iterator[None]:
    """In a process of root's, open files with a user's rights for a while."""
    os.setgroups(identity.groups)
    os.setegid(identity.gid)
    os.seteuid(identity.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def make_share(
    root: int, tag: bytes, *, is_writable: bool, identity: Identity | None = None
) -> VirtioFs:
    """Confine this process to the directory with descriptor `root`, and return its device.

    It becomes the user of `identity`, if there is one.

    Raises:
        VmmError: it cannot be confined.
        OSError: there is no /proc.
    """
    os.umask(0)  # the guest has its own
    limit = min(DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    tree = Tree(root)
    server = FuseServer(tree, is_writable=is_writable)
    confinement = share_confinement(tree.own, is_writable=is_writable)
    try:
        if identity is not None and identity.uid == 0:
            kept = ROOT_CAPABILITIES & held_capabilities()
            confinement = confinement._replace(capabilities=kept)
        elif identity is None and os.geteuid() == 0:
            keep_capabilities(ROOT_CAPABILITIES)
        confine(confinement, identity, Subtree(root, is_writable))
    except SandboxError as err:
        raise VmmError(f"cannot confine the process of a share: {err}") from err
    return VirtioFs(server, tag)
