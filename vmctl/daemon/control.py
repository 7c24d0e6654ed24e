"""The short commands: pause, unpause, load, reload, reset, events.

Each returns the exit status. Texts are OpenBSD's.

Source: sections 3.8 and 3.11 of OpenBSD's behaviour.
"""

import os
import sys
from collections.abc import Sequence
from errno import ENAMETOOLONG

from vmctl.client import (
    Client,
    CommandError,
    Fields,
    RefusedError,
    parse_target,
    text_of,
)
from vmctl.messages import fail
from vmctl.moment import moment
from vmm_kvm.absolute import absolute
from vmm_kvm.text import printable

_PATH_MAX = 4095
"""Bytes of a path. Source: Linux, PATH_MAX, which counts a NUL."""
_RESET_MODES = ("all", "vms", "switches")


def pause(words: Sequence[str]) -> int:
    """Pause a VM."""
    return _named("pause", words[0])


def unpause(words: Sequence[str], *, force: bool = False) -> int:
    """Let a paused VM continue; with `force` though it may run on another host."""
    return _named("unpause", words[0], **({"force": True} if force else {}))


def _named(kind: str, word: str, **fields: object) -> int:
    try:
        target = parse_target(word)
        with Client() as client:
            answer = client.ask(kind, "done", {**target.fields(), **fields})
    except RefusedError as err:
        return fail(f"{kind} vm command failed: {err}")
    except CommandError as err:
        return fail(err)
    print(f"vmctl: {kind}d vm {answer['id']} successfully", file=sys.stderr)
    return 0


def load(words: Sequence[str]) -> int:
    """Let the daemon read another configuration file."""
    # Unlike OpenBSD's: a relative path begins in the user's directory, not in the daemon's.
    try:
        path = absolute(words[0])
    except FileNotFoundError as err:
        return fail(f"failed to open {words[0]}: {err.strerror}")
    if len(os.fsencode(path)) > _PATH_MAX:
        return fail(f"failed to open {words[0]}: {os.strerror(ENAMETOOLONG)}")
    return _plain("load", path=path)


def reload(_words: Sequence[str] = ()) -> int:
    """Let the daemon read its configuration again."""
    return _plain("reload")


def reset(words: Sequence[str] = ()) -> int | None:
    """End VMs, forget switches, or both; None if the word is none of these."""
    mode = words[0].lower() if words else "all"
    return _plain("reset", mode=mode) if mode in _RESET_MODES else None


def _plain(kind: str, **fields: object) -> int:
    try:
        with Client() as client:
            client.ask(kind, "done", fields)
    except RefusedError as err:
        why = "" if err.code == "command-failed" else f": {text_of(err.code)}"
        return fail(f"command failed{why}\n{err.detail}")
    except CommandError as err:
        return fail(err)
    return 0


def events(_words: Sequence[str] = (), *, as_json: bool = False) -> int:
    """Print events of VMs, a line each, until interrupted."""
    import json  # noqa: PLC0415 - loaded by the client anyway

    def line(event: Fields) -> str:
        if as_json:
            return json.dumps({name: event[name] for name in EVENT_FIELDS})
        at = moment(event["at"])
        why = f": {event['message']}" if event["message"] else ""
        return printable(f"{at} {event['id']} {event['name']} {event['kind']}{why}")

    try:
        with Client() as client:
            client.ask("events", "done")
            while True:
                event, _ = client.receive("event")
                print(line(event), flush=True)
    except CommandError as err:
        return fail(err)


EVENT_FIELDS = ("at", "id", "name", "kind", "message")
