"""`vmctl top`: what running VMs use, over and over.

Source: ours; the columns are those of `vmctl status` where they mean the same.
"""

import json
import sys
import time
from collections.abc import Sequence

from vmctl.client import Client, CommandError, Fields
from vmctl.daemon.status import shown_state
from vmctl.messages import fail
from vmd.config.sizes import fmt_scaled

HEADER = (
    "ID",
    "PID",
    "CPU",
    "CURMEM",
    "AVAIL",
    "READ/S",
    "WRITE/S",
    "IN/S",
    "OUT/S",
    "STATE",
    "NAME",
)
_FORMAT = "%5s %5s %6s %7s %7s %7s %7s %7s %7s %8s %s"
_RATES = ("disk_read", "disk_written", "net_received", "net_sent")


def top(
    _words: Sequence[str] = (),
    *,
    delay: str = "1",
    count: str | None = None,
    as_json: bool = False,
) -> int:
    """Show rates every `delay` seconds, `count` times or until interrupted."""
    try:
        delay_s, times = _numbers(delay, count)
        with Client() as client:
            _repeat(client, delay_s, times, as_json=as_json)
    except CommandError as err:
        return fail(err)
    return 0


def _numbers(delay: str, count: str | None) -> tuple[float, int | None]:
    try:
        delay_s, times = float(delay), None if count is None else int(count)
    except ValueError:
        delay_s, times = 0.0, None
    if not 0.1 <= delay_s <= 3600 or (times is not None and times < 1):
        raise CommandError("invalid delay or count")
    return delay_s, times


def _repeat(client: Client, delay_s: float, times: int | None, *, as_json: bool) -> None:
    before = _sample(client)
    at = time.monotonic()
    done = 0
    screen = None
    while times is None or done < times:
        time.sleep(delay_s)
        after, now = _sample(client), time.monotonic()
        seconds, at = now - at, now
        rows = [rates(before.get(vm_id), vm, seconds) for vm_id, vm in after.items()]
        before = after
        done += 1
        if as_json:
            print(json.dumps(rows), flush=True)
        elif sys.stdout.isatty():
            from vmctl.screen.table import Screen  # noqa: PLC0415 - only people see it

            screen = screen or Screen()
            screen.show(HEADER, [columns(row) for row in rows])
        else:
            print(_FORMAT % HEADER)
            for row in rows:
                print(_FORMAT % columns(row))
            sys.stdout.flush()


def _sample(client: Client) -> dict[int, Fields]:
    return {vm["id"]: vm for vm in client.vms(statistics=True) if vm["pid"] is not None}


def rates(before: Fields | None, after: Fields, seconds: float) -> Fields:
    """Return a VM's use per second; a VM that is new has no figures yet.

    `cpu` is a share of one processor, 1.0 for all of it; the others are bytes. What the guest says
    of its memory, and what it has given back, is from the last look before.
    """
    row: Fields = {name: after[name] for name in ("id", "pid", "name", "memory_used")}
    row["state"] = shown_state(after)
    new = after["statistics"]
    row["guest_memory"] = new["guest_memory"] if new else None
    row["given_back"] = new["given_back"] if new else None
    old = before["statistics"] if before and before["pid"] == after["pid"] else None
    if old is None or new is None or seconds <= 0:
        return row | dict.fromkeys(("cpu", *_RATES))
    row["cpu"] = (new["cpu_ns"] - old["cpu_ns"]) / seconds / 1e9
    for name in _RATES:
        row[name] = max(0, int((new[name] - old[name]) / seconds))
    return row


def columns(row: Fields) -> Sequence[str]:
    """Return a row as it is shown."""

    def size(name: str) -> str:
        return "-" if row[name] is None else fmt_scaled(row[name])

    available = (row["guest_memory"] or {}).get("available")
    return (
        str(row["id"]),
        str(row["pid"]),
        "-" if row["cpu"] is None else f"{row['cpu']:.1%}",
        size("memory_used"),
        "-" if available is None else fmt_scaled(available),
        *map(size, _RATES),
        row["state"],
        row["name"],
    )
