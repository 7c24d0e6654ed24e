"""`vmctl clone`: VMs that continue from the state of another one."""

import json
import sys
import time
from collections.abc import Sequence

from vmctl.client import (
    Client,
    CommandError,
    Fields,
    RefusedError,
    check_name,
    parse_target,
    text_of,
)
from vmctl.messages import fail
from vmctl.signals import cleaning_up
from vmctl.values import number_of, once, seconds_of
from vmm_kvm.errors import SpecError
from vmm_kvm.text import printable

_COUNT_MAX = 256
_NOT_READY = "not-ready"
"""The code of a clone that runs no more, because its agent has not made it ready."""


def clone(
    words: Sequence[str],
    *,
    count: tuple[str, ...] = (),
    until: tuple[str, ...] = (),
    timeout: tuple[str, ...] = (),
    as_json: bool = False,
) -> int:
    """Clone a VM; returns the exit status, which is 1 if a clone does not run.

    Args:
        words: the id or name of the VM, and the name of its clones.
        count: number of clones.
        until: `ready`, if each clone's agent has to make it another machine.
        timeout: seconds for that.
        as_json: print the result for each.
    """
    try:
        deadline = _deadline(until, timeout)
        target = parse_target(words[0])
        check_name(words[1].replace("%d", "1", 1))
        asked = once(count, "count")
        number = 1 if asked is None else number_of(asked, "count", _COUNT_MAX)
        with Client() as client:
            fields = {**target.fields(), "clone": words[1], "count": number}
            vms: list[Fields] = client.ask("clone", "cloned", fields)["vms"]
            if deadline is not None:
                _make_ready(client, [vm for vm in vms if not vm["code"]], deadline)
    except RefusedError as err:
        return fail(f"clone vm command failed: {err}")
    except (CommandError, SpecError) as err:
        return fail(err)
    for vm in vms:
        name = printable(vm["name"])
        if vm["code"]:
            detail = f": {printable(vm['message'])}" if vm["message"] else ""
            fail(f"clone {name} failed: {text_of(vm['code'])}{detail}")
        else:
            text = f"started vm {vm['id']} ({name}) successfully, tty {printable(vm['tty'])}"
            print(f"vmctl: {text}", file=sys.stderr)
    if as_json:
        print(json.dumps(vms, indent=2))
    return 1 if any(vm["code"] for vm in vms) else 0


def _deadline(until: tuple[str, ...], timeout: tuple[str, ...]) -> float | None:
    """Return until when clones have to be ready, of the monotonic clock; None if they need not."""
    condition, limit = once(until, "condition"), once(timeout, "time-out")
    seconds = None if limit is None else seconds_of(limit)
    if condition is None:
        if seconds is not None:
            raise SpecError("--timeout is for --wait")
        return None
    if condition != "ready":
        raise SpecError(f"invalid condition: {condition} (ready)")
    return float("inf") if seconds is None else time.monotonic() + seconds


def _make_ready(client: Client, vms: Sequence[Fields], deadline: float) -> None:
    """Have each clone made another machine than its source, or kill it."""
    from vmctl.guest.access import agent_of  # noqa: PLC0415 - only with --wait
    from vmctl.guest.renewal import renew  # noqa: PLC0415 - only with --wait

    waiting = list(vms)
    with cleaning_up():
        try:
            while waiting:
                vm = waiting[0]
                try:
                    renew(agent_of(str(vm["id"]), deadline), vm["name"], deadline)
                except (CommandError, TimeoutError) as err:
                    _kill(client, vm)
                    vm["code"], vm["message"] = _NOT_READY, str(err)
                waiting.pop(0)
        finally:
            for vm in waiting:  # a signal ends the command
                _kill(client, vm)


def _kill(client: Client, vm: Fields) -> None:
    try:
        client.stop(vm["id"], force=True)
    except RefusedError as err:
        if err.code not in {"ENOENT", "not-running"}:  # it has not ended by itself
            raise
