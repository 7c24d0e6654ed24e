"""The one entry to the optimisations of forks; the daemon works without any of them.

The zygote forks a process to warm up in. If that succeeds, the new process is the zygote from then
on, and the old one ends. If it fails, crashes or takes too long, it is killed, and the old one,
unchanged, serves: VMs then start later and cost more memory, and one line in the log says why.
"""

import os
import select
import signal
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING

from vmd.confine.sandbox import acting_as, die_with
from vmd.shared.siblings import fork_sibling
from vmm_kvm.log import Log

if TYPE_CHECKING:
    from vmd.zygote.warm.gathering import Live
    from vmd.zygote.warm.rehearsal import BeVm

log = Log(__name__)

VARIABLE = "VMD_WARM"
"""The variable of the daemon's environment that names a `Warmth`."""
WARMING_PATIENCE_S = 20.0
"""How long warming up may take, on the slowest of hosts."""
GATHERING_VERSIONS = frozenset({(3, 11), (3, 13), (3, 14)})
"""Versions of CPython on which the tests of gathering pass, and it saves memory.

3.12, which no Debian release has, is not among them: there, VMs' lives are only rehearsed.
"""
CONSTANT_VERSIONS = frozenset({(3, 11)})
"""Versions on which names and constants are gathered as well; on newer ones, most are immortal."""
IMMORTAL_VERSIONS = frozenset({(3, 13), (3, 14)})
"""Versions on which all other objects are made immortal instead."""
_TEXT_MAX = 200
_READY = b"\0"
_ALONE = b"\1"


class WarmthError(Exception):
    """The environment asks for an unknown warmth; one line."""


class Warmth(StrEnum):
    """Work done before a VM needs it."""

    OFF = "off"
    """Nothing."""
    REHEARSE = "rehearse"
    """Lives of VMs are rehearsed, holes in memory filled, and functions that ran are gathered."""
    ALL = "all"
    """Tuples or counts of references are written to: `CONSTANT_VERSIONS`, `IMMORTAL_VERSIONS`."""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Warmth":
        """Return the environment's choice, else the default.

        Raises:
            WarmthError: it is none.
        """
        text = environ.get(VARIABLE) or cls.REHEARSE
        try:
            return cls(text)
        except ValueError:
            names = ", ".join(cls)
            raise WarmthError(f"{VARIABLE}: {text[:_TEXT_MAX]!r} is none of {names}") from None


def warm_up(
    warmth: Warmth,
    confine: Callable[[], None],
    be_vm: "BeVm",
    live: "Live",
    *,
    served: int,
    patience_s: float,
    uid: int | None = None,
) -> None:
    """Confine and warm up a fork of this process, or else this one; the other ends.

    Returns in the process that serves; both have the same parent. `be_vm` and `live` are rehearsed.
    `uid` is the user, if any, that `confine` makes the process.
    Both end when the other end of `served`, a socket, is closed: nobody is left to serve then.
    Only for a process with one thread.

    Raises:
        OSError: the host has no processes or descriptors left.
    """
    if warmth is Warmth.OFF:
        confine()
        return
    read_fd, write_fd = os.pipe()
    pid = fork_sibling()
    if pid == 0:
        os.close(read_fd)
        _try(lambda: _work(warmth, confine, be_vm, live), write_fd)
        return
    other = os.pidfd_open(pid)
    os.close(write_fd)
    told = _listen(read_fd, served, patience_s)
    os.close(read_fd)
    if told == _READY:
        os._exit(0)
    _kill(other, uid)
    if told == _ALONE:
        os._exit(0)
    os.close(other)
    if told is None:
        why = f"not done in {patience_s:g} seconds"
    else:
        why = told.decode(errors="replace") or "its process has ended"
    log.warning("not warmed up, so each VM costs more memory: %s", why)
    confine()


def _work(warmth: Warmth, confine: Callable[[], None], be_vm: "BeVm", live: "Live") -> None:
    from vmd.zygote.warm.immortal import immortalise  # noqa: PLC0415 - what fails here fails alone
    from vmd.zygote.warm.packing import fill_holes  # noqa: PLC0415 - likewise
    from vmd.zygote.warm.rehearsal import Rehearsal  # noqa: PLC0415 - likewise

    parent = os.getppid()
    wants_all = warmth is Warmth.ALL
    counts_less = wants_all and _runs_on(IMMORTAL_VERSIONS)
    with Rehearsal() as rehearsal:
        confine()
        die_with(parent)
        if _is_known("objects are gathered", GATHERING_VERSIONS):
            writes = (
                wants_all
                and not counts_less
                and _is_known("tuples are written to", CONSTANT_VERSIONS)
            )
            rehearsal.play_and_gather(be_vm, live, writes_tuples=writes)
        else:
            rehearsal.play_often(be_vm)
    if counts_less:
        immortalise()
    fill_holes()


def _is_known(what: str, versions: Collection[tuple[int, int]]) -> bool:
    """Tell whether an optimisation is known to work on this interpreter; log it if not."""
    if _runs_on(versions):
        return True
    log.warning(
        "no %s: not tested on %s %d.%d", what, sys.implementation.name, *sys.version_info[:2]
    )
    return False


def _runs_on(versions: Collection[tuple[int, int]]) -> bool:
    return sys.implementation.name == "cpython" and sys.version_info[:2] in versions


def _try(work: Callable[[], None], fd: int) -> None:
    """Work, report the result on `fd`, and return after success; else end this process."""
    told = b""
    try:
        work()
        told = _READY
    except BaseException as err:  # noqa: BLE001 - the daemon continues without, at any error
        lines = f"{type(err).__name__}: {err}".splitlines()
        told = lines[0][:_TEXT_MAX].encode(errors="replace")
    finally:
        os.write(fd, told)
        os.close(fd)
        if told != _READY:
            os._exit(1)


def _kill(pidfd: int, uid: int | None) -> None:
    with suppress(ProcessLookupError):
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except PermissionError:
            if uid is None:
                raise
            with acting_as(uid):  # it is confined already
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _listen(fd: int, served: int, patience_s: float) -> bytes | None:
    """Return the other process's message; empty if it ends without one.

    None if it takes too long, and _ALONE if the other end of `served` is closed before.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(served, 0)  # for POLLHUP alone
    ready = dict(poll.poll(patience_s * 1000))
    if fd in ready:
        return os.read(fd, select.PIPE_BUF)
    return _ALONE if ready else None
