"""The short commands: stop, pause, unpause, load, reload, reset, log, events, send, receive.

Each returns the exit status. Texts are OpenBSD's.

Source: sections 3.7, 3.8, 3.10 and 3.11 of OpenBSD's behaviour.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from vmctl.client import (
    Client,
    CommandError,
    Fields,
    RefusedError,
    Target,
    parse_target,
    text_of,
)
from vmctl.messages import fail
from vmctl.report import Report
from vmm_kvm.text import printable

_RESET_MODES = ("all", "vms", "switches")
_LOG_LEVELS = (("brief", 0), ("verbose", 2))


def stop(
    words: Sequence[str] = (),
    *,
    force: bool = False,
    wait: bool = False,
    every: bool = False,
    as_json: bool = False,
) -> int | None:
    """Stop a VM, or with `every` each one that runs; None if both are named, or neither."""
    if every == bool(words):
        return None
    report = Report(as_json)
    try:
        if every:
            return _stop_all(force=force, wait=wait, as_json=as_json)
        target = parse_target(words[0])
        with Client() as client:
            return _stop(client, target, report, force=force, wait=wait)
    except CommandError as err:
        fail(err)
        return report.end(1, str(err))


def _stop_all(*, force: bool, wait: bool, as_json: bool) -> int:
    """Ask every VM that runs to stop.

    With `wait` they are all asked before one is waited for, and the status is 1 if any is not
    stopped; without, a failure does not show in it, as in OpenBSD.
    """
    status = 0
    with ExitStack() as stack:
        client = stack.enter_context(Client())
        asked: list[tuple[Client, Target, Report]] = []
        for vm in client.vms():
            if vm["pid"] is None:
                continue
            target, report = Target(name=vm["name"]), Report(as_json)
            if not wait:
                _stop(client, target, report, force=force, wait=False)
                continue
            # One that takes long must not keep the others from being asked.
            own = stack.enter_context(Client())
            own.send("stop", {**target.fields(), "force": force, "wait": True})
            asked.append((own, target, report))
        for own, target, report in asked:
            _begin_line("stopping", target)
            with ending_the_line():
                status |= finish(own, "stop", "terminated", report)
    return status


def _stop(client: Client, target: Target, report: Report, *, force: bool, wait: bool) -> int:
    _begin_line("stopping", target)
    return complete(client, "stop", target, report, force=force, wait=wait)


def _begin_line(doing: str, target: Target) -> None:
    name = f" {target.name}" if target.name else ""
    print(f"{doing} vm{printable(name)}: ", end="", file=sys.stderr, flush=True)


def complete(client: Client, kind: str, target: Target, report: Report, **fields: object) -> int:
    """Ask for something, and end the line that says so with what has become of it."""
    expected = "terminated" if fields.get("wait") else "done terminated"
    with ending_the_line():
        client.send(kind, {**target.fields(), **fields})
        return finish(client, kind, expected, report)


@contextmanager
def ending_the_line() -> Iterator[None]:
    """End the line that says what is waited for, before an error has lines of its own."""
    try:
        yield
    except CommandError:
        print(file=sys.stderr)
        raise


def finish(client: Client, kind: str, expected: str, report: Report) -> int:
    """End the line that says what is waited for with what has become of it.

    Raises:
        CommandError: there is no answer, or one that is not among `expected`.
    """
    try:
        answer, fds = client.receive(expected)
    except RefusedError as err:
        text = why_not(kind, err.code)
        print(text, file=sys.stderr)
        return report.end(1, text)
    for fd in fds:
        os.close(fd)
    is_terminated = answer["type"] == "terminated"
    text = "terminated" if is_terminated else "requested to shutdown"
    print(f"{text} vm {answer['id']}", file=sys.stderr)
    return report.end(0, text, answer["id"])


def why_not(kind: str, code: str) -> str:
    """Return what is said of a `stop` or `wait` that failed with `code`."""
    return {
        "not-running": f"cannot {'stop' if kind == 'stop' else 'wait for'} vm that is not running",
        "ENOENT": "vm not found",
        "EINTR": "interrupted call",
    }.get(code, f"failed: {text_of(code)}")


def pause(words: Sequence[str]) -> int:
    """Pause a VM."""
    return _named("pause", words[0])


def unpause(words: Sequence[str]) -> int:
    """Let a paused VM go on."""
    return _named("unpause", words[0])


def _named(kind: str, word: str) -> int:
    try:
        target = parse_target(word)
        with Client() as client:
            answer = client.ask(kind, "done", target.fields())
    except RefusedError as err:
        return fail(f"{kind} vm command failed: {err}")
    except CommandError as err:
        return fail(err)
    print(f"vmctl: {kind}d vm {answer['id']} successfully", file=sys.stderr)
    return 0


def load(words: Sequence[str]) -> int:
    """Let the daemon read another configuration file."""
    # Unlike OpenBSD's: a relative path begins where the user is, not where the daemon is.
    return _plain("load", path=os.path.abspath(words[0]))


def reload(_words: Sequence[str] = ()) -> int:
    """Let the daemon read its configuration again."""
    return _plain("reload")


def reset(words: Sequence[str] = ()) -> int | None:
    """End VMs, forget switches, or both; None if the word is none of these."""
    mode = words[0].lower() if words else "all"
    return _plain("reset", mode=mode) if mode in _RESET_MODES else None


def log(words: Sequence[str]) -> int | None:
    """Set how much the daemon logs; None if the word is no level."""
    for name, level in _LOG_LEVELS:
        if words[0] and name.startswith(words[0].lower()):
            return _plain("log", level=level)
    return None


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
    """Print what happens to VMs, a line each, until interrupted."""
    import json  # noqa: PLC0415 - loaded by the client anyway
    import time  # noqa: PLC0415 - for this command alone

    def line(event: Fields) -> str:
        if as_json:
            return json.dumps({name: event[name] for name in _EVENT_FIELDS})
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(event["at"]))
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


_EVENT_FIELDS = ("at", "id", "name", "kind", "message")


def send(_words: Sequence[str]) -> int:
    """Say that a VM cannot be sent yet."""
    return fail("send: not supported yet")


def receive(_words: Sequence[str]) -> int:
    """Say that a VM cannot be received yet."""
    return fail("receive: not supported yet")
