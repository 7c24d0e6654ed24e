"""`vmctl wait`: until a VM ends, or is in a state, or shows a text on its console.

Source: section 3.9 of OpenBSD's behaviour, for the plain form; the others are ours.
"""

import os
import select
import sys
import time
from collections.abc import Sequence

from vmctl.client import (
    Client,
    CommandError,
    Fields,
    RefusedError,
    Target,
    opened,
    parse_target,
)
from vmctl.daemon.stop import finish, why_not
from vmctl.messages import CONSOLE_CONDITION, GUEST_CONDITIONS, choice, fail
from vmctl.moment import seconds_in
from vmctl.report import EXIT_TIMEOUT, Report
from vmm_kvm.text import printable

_STATES = ("running", "stopped")
_PACKET_MAX = 64 << 10


class ExpiredError(Exception):
    """The time is over."""


def wait(
    words: Sequence[str],
    *,
    until: str | None = None,
    timeout: str | None = None,
    as_json: bool = False,
) -> int:
    """Wait for a VM; returns the exit status, 124 when `timeout` seconds are over first."""
    report = Report(as_json)
    try:
        target = parse_target(words[0])
        deadline = _deadline(timeout)
        name = f" {target.name}" if target.name else ""
        if until is not None:
            check_condition(until)
        with Client() as client:
            print(f"waiting for vm{printable(name)}: ", end="", file=sys.stderr, flush=True)
            return _wait(client, target, until, deadline, report)
    except CommandError as err:
        fail(err)
        return report.end(1, str(err))


def _wait(
    client: Client, target: Target, until: str | None, deadline: float | None, report: Report
) -> int:
    status = 0
    try:
        if until is None:
            client.send("wait", target.fields())
            _await(client.fileno(), deadline)
            return finish(client, "wait", "terminated", report)
        text = wait_for(client, target, until, deadline)
    except ExpiredError:
        status, text = EXIT_TIMEOUT, "timed out"
    except RefusedError as err:
        status, text = 1, why_not("wait", err.code)
    except CommandError:
        print(file=sys.stderr)
        raise
    print(text, file=sys.stderr)
    return report.end(status, text)


def wait_for(client: Client, target: Target, condition: str, deadline: float | None) -> str:
    """Wait until a condition holds, by a connection without other requests; returns the last event.

    `deadline` is of the monotonic clock, seconds.

    Raises:
        ExpiredError: it is over.
        CommandError: the condition can never hold.
    """
    if condition in _STATES:
        return _wait_for_state(client, target, condition, deadline)
    if _is_in_guest(condition):
        from vmctl.guest.readiness import wait_for_guest  # noqa: PLC0415 - only for these

        try:
            return wait_for_guest(target, condition, float("inf") if deadline is None else deadline)
        except TimeoutError:
            raise ExpiredError from None
    return _wait_for_text(client, target, condition.removeprefix(CONSOLE_CONDITION), deadline)


def check_condition(condition: str) -> None:
    """Refuse what cannot be waited for.

    Raises:
        CommandError: it is no condition.
    """
    if _is_in_guest(condition):
        from vmctl.guest.readiness import check_guest_condition  # noqa: PLC0415 - only for these

        check_guest_condition(condition)
    elif condition == CONSOLE_CONDITION:  # every console has that
        raise CommandError(f"invalid condition: {condition}")
    elif condition not in _STATES and not condition.startswith(CONSOLE_CONDITION):
        in_guest = ("ready", "file=path", "port=number", "unit=name")
        known = choice((*_STATES, *in_guest, f"{CONSOLE_CONDITION}text"))
        raise CommandError(f"invalid condition: {condition} ({known})")


def _is_in_guest(condition: str) -> bool:
    """Tell whether it is a condition that the guest's agent knows of."""
    return any(
        condition.startswith(one) if one.endswith("=") else condition == one
        for one in GUEST_CONDITIONS
    )


def _deadline(timeout: str | None) -> float | None:
    if timeout is None:
        return None
    seconds = seconds_in(timeout)
    if seconds is None:
        raise CommandError(f"invalid time-out: {timeout}: not a number of seconds")
    return time.monotonic() + seconds


def _await(fd: int, deadline: float | None) -> None:
    """Wait until there is something to read.

    Raises:
        ExpiredError: there was nothing in time.
    """
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    if not select.select([fd], [], [], left)[0]:
        raise ExpiredError


def _wait_for_state(client: Client, target: Target, state: str, deadline: float | None) -> str:
    """Look after every event: what happens between them is of no interest."""
    client.ask("events", "done")
    while True:
        # Events may be in front of the answer: another connection has none.
        with Client() as other:
            vm = _find(other.vms(), target)
        if vm is None and state != "stopped":
            raise CommandError("vm not found")
        if vm is None or vm["state"] == state:
            return state
        _await(client.fileno(), deadline)
        client.receive("event")


def _find(vms: list[Fields], target: Target) -> Fields | None:
    return next((vm for vm in vms if target.is_named_by(vm)), None)


def _wait_for_text(client: Client, target: Target, text: str, deadline: float | None) -> str:
    """Read the console, from 64 KiB back, until `text` appears."""
    wanted = os.fsencode(text)
    client.send("console", target.fields())
    _await(client.fileno(), deadline)
    stream, _ = opened(client)
    seen = b""
    with stream:
        while wanted not in seen:
            _await(stream.fileno(), deadline)
            data = stream.recv(_PACKET_MAX)
            if not data:
                raise CommandError("the console has ended")
            seen = seen[-len(wanted) :] + data
    return "found"
