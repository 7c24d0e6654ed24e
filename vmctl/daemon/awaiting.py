"""Waiting for the daemon's answer to a long request, while events tell a terminal how far it is."""

import select
import sys
from collections.abc import Callable

from vmctl.client import Client, CommandError, Fields
from vmm_kvm.text import printable


def await_done(client: Client, events: Client, shown: Callable[[Fields], str]) -> Fields:
    """Return the answer `done`; `shown` returns the line for an event, or nothing.

    Raises:
        CommandError: the daemon refuses, or is gone.
    """
    poll = select.poll()
    for each in (client, events):
        poll.register(each.fileno(), select.POLLIN)
    is_terminal = sys.stderr.isatty()
    try:
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if client.fileno() in ready:
                answer, fds = client.receive("done")
                assert not fds
                return answer
            try:
                event, _ = events.receive("event")
            except CommandError:  # what counts is the answer
                poll.unregister(events.fileno())
                continue
            text = shown(event) if is_terminal else ""
            if text:
                print(f"\r\x1b[K{printable(text)}", end="", file=sys.stderr, flush=True)
    finally:
        if is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
