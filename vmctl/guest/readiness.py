"""Waiting for something in a guest, by its agent: the agent itself, a file, a port, a unit."""

import time

from vmctl.client import CommandError, Target
from vmctl.guest.access import agent_of, pauses
from vmctl.guest.agent import AgentError
from vmctl.messages import GUEST_CONDITIONS

_LONG_S = 1e8


def check_guest_condition(condition: str) -> None:
    """Refuse an invalid condition in a guest.

    Raises:
        CommandError: a file or unit without a name, or no number of a port.
    """
    kind, equals, what = condition.partition("=")
    is_port = what.isascii() and what.isdecimal() and 0 < int(what[:6]) < 1 << 16
    if equals and (not what or (kind == "port" and not is_port)):
        raise CommandError(f"invalid condition: {condition}")


def wait_for_guest(target: Target, condition: str, deadline: float) -> str:
    """Wait for the agent of a VM, or through it; returns the satisfied condition.

    Raises:
        TimeoutError: nothing before `deadline`, which is of the monotonic clock.
        CommandError: the VM does not run, or has no vsock device, or the agent refuses.
    """
    assert condition.startswith(GUEST_CONDITIONS)
    kind, _, what = condition.partition("=")
    word = str(target.id) if target.id else target.name
    for pause in pauses():
        agent = agent_of(word, deadline)
        left = min(_LONG_S, deadline - time.monotonic())
        try:
            if kind == "ready":
                agent.ping(timeout=left)
                return "ready"
            agent.wait_for(
                file=what if kind == "file" else None,
                port=int(what) if kind == "port" else None,
                unit=what if kind == "unit" else None,
                timeout=left,
            )
        except AgentError:  # not yet there, or gone with a reboot
            if time.monotonic() + pause >= deadline:
                raise TimeoutError("timed out") from None
            time.sleep(pause)
        else:
            return "found"
    raise AssertionError("there is always another pause")
