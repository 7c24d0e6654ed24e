"""A log line for each request that changes something: the user, the request, and the result.

Source: section 5.1 of OpenBSD's behaviour, for what is refused.
"""

import errno
import os
import pwd
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from vmd.rules.vm import Vm
from vmd.shared import log as logging
from vmd.wire.messages import (
    AnyAnswer,
    Console,
    ErrorCode,
    Failed,
    Hold,
    Load,
    Log,
    ParentRequest,
    Pause,
    Reload,
    Reset,
    Start,
    Started,
    Stop,
    Unpause,
)
from vmd.wire.parts import VmRequest
from vmd.wire.ports import Connect, Debug
from vmd.wire.transfers import Clone, Receive, RemoveSnapshot, Send, Snapshot

_DONE: dict[type[ParentRequest], str] = {
    Start: "started",
    Stop: "stopped",
    Pause: "paused",
    Unpause: "unpaused",
    Send: "sent",
    Receive: "received",
    Snapshot: "snapshot made",
    RemoveSnapshot: "removed",
    Clone: "cloned",
    Console: "console opened",
    Connect: "connected with a port",
    Debug: "debugged",
    Load: "configuration loaded",
    Reload: "configuration reloaded",
    Reset: "reset",
    Log: "log level set",
    Hold: "starts held",
}
"""Requests that are logged; the others only look, or wait."""


class _Asked(NamedTuple):
    uid: int
    kind: type[ParentRequest]
    what: str
    vm_id: int


class RequestLog:
    """Requests until they are answered, which then are logged."""

    def __init__(
        self, find: Callable[[int, str], Vm | None], note: Callable[[int, str], None]
    ) -> None:
        """Begin without requests.

        `find` returns the VM that a request names by its id or its name; `note` is called with each
        line about a VM, by its id.
        """
        self._find = find
        self._note = note
        self._asked: dict[int, dict[int, deque[_Asked]]] = {}

    def asked(self, client: int, uid: int, request: ParentRequest) -> None:
        """Note that `uid` asks."""
        kind = type(request)
        if kind not in _DONE:
            return
        what, vm_id = "vmd", 0
        if isinstance(request, Receive):
            what = request.name
        elif isinstance(request, RemoveSnapshot):
            what = f"snapshot {request.snapshot}"
        elif isinstance(request, VmRequest):
            vm = self._find(request.id, request.name)
            what = vm.name if vm else request.name or f"vm {request.id}"
            vm_id = vm.id if vm else 0
        serials = self._asked.setdefault(client, {})
        serials.setdefault(request.serial, deque()).append(_Asked(uid, kind, what, vm_id))

    def answered(self, client: int, answer: AnyAnswer) -> None:
        """Tell of the request that this answers."""
        serials = self._asked.get(client, {})
        waiting = serials.get(answer.serial)
        if not waiting:
            return
        asked = waiting.popleft()
        if not waiting:
            del serials[answer.serial]
        user, vm_id = _user(asked.uid), asked.vm_id
        if isinstance(answer, Failed):
            verb = "remove" if asked.kind is RemoveSnapshot else asked.kind.__name__.lower()
            why = answer.message or _words(answer.code)
            text = f"{verb} by {user} failed: {why}"
            if answer.code is ErrorCode.EPERM:  # no user fills the history of others' VMs
                vm_id = 0
        else:
            text = f"{_DONE[asked.kind]} by {user}"
            if isinstance(answer, Started):
                vm_id = answer.id
        logging.tell(
            logging.Asked(
                f"requests of {user}",
                asked.uid,
                str(asked.kind.__struct_config__.tag),
                asked.what if issubclass(asked.kind, VmRequest | Receive) else "",
            ),
            *("%s: %s", asked.what, text),
        )
        self._note(vm_id, text)

    def gone(self, client: int) -> None:
        """Forget a client that will get no more answers."""
        self._asked.pop(client, None)

    def clear(self) -> None:
        """Forget all clients."""
        self._asked.clear()


@lru_cache(maxsize=256)
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _words(code: ErrorCode) -> str:
    """Return what a code says to people."""
    if code is ErrorCode.EPROCLIM:  # which Linux has not
        return "there is such a VM"
    number = getattr(errno, code.value, None)
    return os.strerror(number) if isinstance(number, int) else code.replace("-", " ")
