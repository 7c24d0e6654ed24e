"""`vmctl stop`: one VM, or with `-a` every one that runs, starts, or waits for its turn to start.

With `-a` root holds all starts meanwhile. VMs are asked in the reverse of the order in which they
start; the daemon sees to it that each is asked when those that start after it have ended.

Source: section 3.7 of OpenBSD's behaviour, for the texts.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from vmctl.client import Client, CommandError, Fields, RefusedError, Target, parse_target, text_of
from vmctl.messages import fail
from vmctl.report import Report
from vmm_kvm.text import printable

_ENDED = {"not-running", "ENOENT"}
"""Codes of a refusal that says that there is nothing to stop any more."""


def stop(
    words: Sequence[str] = (),
    *,
    force: bool = False,
    wait: bool = False,
    every: bool = False,
    as_json: bool = False,
) -> int | None:
    """Stop a VM, or with `every` all; None if both are named, or neither."""
    if every == bool(words):
        return None
    report = Report(as_json)
    try:
        if every:
            with Client() as client:
                return _stop_all(client, force=force, wait=wait, as_json=as_json)
        target = parse_target(words[0])
        with Client() as client:
            return _stop(client, target, report, force=force, wait=wait)
    except CommandError as err:
        fail(err)
        return report.end(1, str(err))


def _stop(client: Client, target: Target, report: Report, *, force: bool, wait: bool) -> int:
    _begin_line("stopping", target)
    return _complete(client, "stop", target, report, force=force, wait=wait)


def _begin_line(doing: str, target: Target) -> None:
    """Begin a line about a wait."""
    name = f" {target.name}" if target.name else ""
    print(f"{doing} vm{printable(name)}: ", end="", file=sys.stderr, flush=True)


def _complete(client: Client, kind: str, target: Target, report: Report, **fields: object) -> int:
    """Send a request, and end the line about it with the outcome."""
    expected = "terminated" if fields.get("wait") else "done terminated"
    with _ending_the_line():
        client.send(kind, {**target.fields(), **fields})
        # A VM that is stopping already is only waited for.
        awaited = target if kind == "stop" and fields.get("wait") else None
        return finish(client, kind, expected, report, awaited)


@contextmanager
def _ending_the_line() -> Iterator[None]:
    """End the line about a wait, before an error has lines of its own."""
    try:
        yield
    except CommandError:
        print(file=sys.stderr)
        raise


def finish(
    client: Client, kind: str, expected: str, report: Report, awaited: Target | None = None
) -> int:
    """End the line about a wait with the outcome; `awaited`: wait for this VM if it is stopping.

    Raises:
        CommandError: there is no answer, or one that is not among `expected`.
    """
    try:
        answer, fds = _received(client, expected, awaited)
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


def _received(client: Client, expected: str, awaited: Target | None) -> tuple[Fields, list[int]]:
    try:
        return client.receive(expected)
    except RefusedError as err:
        if awaited is None or err.code != "EALREADY":
            raise
    client.send("wait", awaited.fields())
    return client.receive(expected)


def why_not(kind: str, code: str) -> str:
    """Return the text for a `stop` or `wait` that failed with `code`."""
    return {
        "not-running": f"cannot {'stop' if kind == 'stop' else 'wait for'} vm that is not running",
        "ENOENT": "vm not found",
        "EINTR": "interrupted call",
    }.get(code, f"failed: {text_of(code)}")


def _stop_all(client: Client, *, force: bool, wait: bool, as_json: bool) -> int:
    """Ask every VM to stop.

    With `wait` they are all asked before one is waited for, and the status is 1 if any is not
    stopped; without, a failure does not show in it, as in OpenBSD.

    Raises:
        CommandError: the daemon does not answer.
    """
    with suppress(RefusedError):  # without root, starts of other users continue
        client.ask("hold", "done")
    vms = [vm for vm in client.vms() if vm["state"] != "stopped"]
    asked: list[tuple[Fields, Report]] = []
    status = 0
    for vm in last_first(vms):
        target, report = Target(id=vm["id"], name=vm["name"]), Report(as_json)
        how = {"force": force, "in_order": True}
        if not wait:
            _begin_line("stopping", target)
            _complete(client, "stop", target, report, **how)
            continue
        try:
            client.ask("stop", "done", {**target.fields(), **how})
        except RefusedError as err:
            # One that is stopping already, or has just ended, is only waited for.
            if err.code not in {"EALREADY", *_ENDED}:
                _begin_line("stopping", target)
                status |= _failed(err, report)
                continue
        asked.append((vm, report))
    for vm, report in asked:
        _begin_line("stopping", Target(name=vm["name"]))
        with _ending_the_line():
            status |= _await_end(client, vm, report)
    return status


def last_first(vms: Sequence[Fields]) -> list[Fields]:
    """Return VMs so that each stands behind all that start after it."""
    left = list(vms)
    found: list[Fields] = []
    while left:
        awaited = {name for vm in left for name in vm["after"]}
        free = [vm for vm in left if vm["name"] not in awaited]
        found += free or left  # a ring is nothing that the daemon has
        left = [vm for vm in left if free and vm not in free]
    return found


def _await_end(client: Client, vm: Fields, report: Report) -> int:
    """Wait until a VM has ended, and say so; returns the exit status."""
    one = {"id": vm["id"]}
    try:
        while True:
            client.ask("wait", "terminated", one)
            # It may have rebooted, if it was not its turn to be asked yet.
            shown = client.ask("status", "vms", one)["vms"]
            if not shown or shown[0]["state"] == "stopped":
                break
    except RefusedError as err:
        if err.code not in _ENDED:
            return _failed(err, report)
    print(f"terminated vm {vm['id']}", file=sys.stderr)
    return report.end(0, "terminated", vm["id"])


def _failed(err: RefusedError, report: Report) -> int:
    text = why_not("stop", err.code)
    print(text, file=sys.stderr)
    return report.end(1, text)
