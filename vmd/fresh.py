"""Zygotes that execute a new interpreter, so that each has an address layout of its own.

Whatever is forked has the layout of whoever forks: without this, the parent, vmm, control and the
processes of all VMs have the same one, and a guest that finds out one process's addresses knows the
others'. A zygote of this kind shares its layout with nothing but the VMs that it forks.

Source: execve(2), Linux Documentation/admin-guide/sysctl/kernel.rst, "randomize_va_space"
"""

import json
import os
import socket
import sys
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, NoReturn

from vmd.confine.confinements import Kind
from vmd.confine.sandbox import set_title
from vmd.confine.uids import UidRange, Uids
from vmd.shared import log as logging
from vmd.shared.privsep import Plan, live
from vmd.zygote.warm.entry import Warmth

_CODE = "import sys; sys.path[:] = {path!r}; from vmd.children import resume; resume({told!r})"

Body = Callable[[socket.socket], None]


class Told(NamedTuple):
    """A zygote's settings, with the numbers of its descriptors."""

    kvm_fd: int
    uids: tuple[int, int, int] | None
    """First, count, and the descriptor of the lease."""
    held: Sequence[int]
    """Descriptors that it and its children keep."""
    warmth: str
    connection: int = -1
    log_fd: int = -1
    sink: str = ""
    level: int = 0

    def owned(self) -> Uids | None:
        """Return the uids."""
        if self.uids is None:
            return None
        first, size, fd = self.uids
        return Uids(UidRange(first, size), fd)


def fresh_plan(kvm_fd: int, uids: Uids | None, held: Sequence[int], warmth: Warmth) -> Plan:
    """Return how to make a zygote that executes a new interpreter."""
    leased = None if uids is None else (*uids.part, uids.fd)
    told = Told(kvm_fd, leased, tuple(held), str(warmth))

    def body(connection: socket.socket) -> None:
        fd, sink, level = logging.place()
        all_told = told._replace(
            connection=connection.fileno(), log_fd=fd, sink=sink.name, level=level
        )
        for kept in _kept(all_told):
            os.set_inheritable(kept, True)
        code = _CODE.format(path=sys.path, told=json.dumps(all_told))
        os.execv(sys.executable, [sys.executable, "-I", "-B", "-c", code])  # noqa: S606 - as meant

    return Plan(Kind.ZYGOTE, body, (kvm_fd, *held))


def resume_zygote(text: str, body: Callable[[Told], Body]) -> NoReturn:
    """Be the zygote that `text` tells of, in the new interpreter."""
    told = Told(*json.loads(text))
    for fd in _kept(told):
        os.set_inheritable(fd, False)
    logging.resume(told.log_fd, logging.Sink[told.sink], told.level)
    set_title(f"vmd: {Kind.ZYGOTE}")

    def run() -> int:
        body(told)(socket.socket(fileno=told.connection))
        return 0

    live(Kind.ZYGOTE, {told.connection, told.kvm_fd, *told.held}, run)


def _kept(told: Told) -> Collection[int]:
    return {told.connection, told.kvm_fd, told.log_fd, *told.held}
