"""`vmctl migrate`: a VM continues at another host, to which `ssh` leads.

`vmctl receive --live` runs there. Its standard input and output are the ends of two pipes, whose
other ends the daemon here has. So authentication, encryption and rights there are those of ssh.

An interrupt cancels, if it is not too late. ssh is not interrupted with this command: it might cut
the two daemons off from each other in the middle of the hand-over.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from vmctl.client import (
    Client,
    CommandError,
    Fields,
    RefusedError,
    Target,
    check_name,
    parse_target,
)
from vmctl.daemon.awaiting import await_done
from vmctl.messages import fail
from vmctl.moment import seconds_in
from vmctl.signals import cleaning_up
from vmm_kvm.text import printable

_DOWNTIME_MAX_MS = 3_600_000
_TIMEOUT_MAX_S = 604_800
_PATIENCE_S = 5
"""For ssh to end, in seconds, and to say why the other host did not take the VM."""


class _Plan(NamedTuple):
    downtime_ms: int
    timeout_s: int
    forces: bool
    copies_storage: bool


def migrate(
    words: Sequence[str],
    *,
    downtime: str = "300",
    timeout: str = "0",
    on_timeout: str = "cancel",
    ssh: str = "ssh",
    copies_storage: bool = False,
) -> int:
    """Hand a VM over to the daemon of another host; returns the exit status."""
    try:
        target, host = parse_target(words[0]), words[1]
        _check_host(host)
        plan = _plan(downtime, timeout, on_timeout)._replace(copies_storage=copies_storage)
        command = _command(ssh)
        with Client() as client:
            name = _name(client, target)
        with cleaning_up():
            _migrate(name, [*command, host], plan)
    except RefusedError as err:
        return fail(f"migrate vm command failed: {err}")
    except (CommandError, ValueError) as err:
        return fail(err)
    print(f"vmctl: migrated vm {printable(name)} to {printable(host)}", file=sys.stderr)
    return 0


def _check_host(host: str) -> None:
    """Refuse what ssh would take for an option.

    Raises:
        CommandError: it is that, or empty.
    """
    if not host or host.startswith("-"):
        raise CommandError(f"invalid host: {host}")


def _plan(downtime: str, timeout: str, on_timeout: str) -> _Plan:
    """Read the options.

    Raises:
        CommandError: one is none.
    """
    if not (downtime.isascii() and downtime.isdecimal()) or int(downtime) > _DOWNTIME_MAX_MS:
        raise CommandError(f"invalid downtime: {downtime}")
    seconds = seconds_in(timeout)
    if seconds is None or seconds > _TIMEOUT_MAX_S:
        raise CommandError(f"invalid timeout: {timeout}")
    if on_timeout not in {"cancel", "force"}:
        raise CommandError(f"invalid on-timeout: {on_timeout}: cancel or force")
    return _Plan(int(downtime), -int(-seconds // 1), on_timeout == "force", copies_storage=False)


def _command(ssh: str) -> list[str]:
    """Return the words of a command.

    Raises:
        CommandError: there are none.
        ValueError: a quotation does not end.
    """
    words = shlex.split(ssh)
    if not words:
        raise CommandError("invalid ssh: no command")
    return words


def _name(client: Client, target: Target) -> str:
    vms = client.ask("status", "vms", target.fields())["vms"]
    if not vms:
        raise RefusedError("ENOENT", "no such VM")
    name = str(vms[0]["name"])
    check_name(name)
    return name


def _migrate(name: str, ssh: Sequence[str], plan: _Plan) -> None:
    """Connect the daemons, and wait until the VM is there.

    Raises:
        CommandError: it is not.
    """
    stream, sink = os.pipe2(os.O_CLOEXEC)
    replies, answers = os.pipe2(os.O_CLOEXEC)
    ours = [sink, replies]
    try:
        os.set_blocking(sink, False)
        try:
            options = "--live --copy-storage" if plan.copies_storage else "--live"
            command = [*ssh, f"exec vmctl receive {options} {shlex.quote(name)}"]
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited
            try:
                remote = subprocess.Popen(command, stdin=stream, stdout=answers)
            finally:
                signal.signal(signal.SIGINT, before)
        except OSError as err:
            raise CommandError(f"{ssh[0]}: {err.strerror}") from err
        finally:
            os.close(stream)
            os.close(answers)
        is_over = False
        try:
            with Client() as client, Client() as events:
                events.ask("events", "done")
                fields = {"name": name, "stream": 0, "replies": 1, **plan._asdict()}
                client.send("send", fields, ours)
                while ours:
                    os.close(ours.pop())
                try:
                    await_done(client, events, lambda event: _shown(event, name))
                except RefusedError:
                    is_over = True
                    raise
        finally:
            while ours:
                os.close(ours.pop())
            _leave(remote, is_over=is_over)
            if is_over and remote.returncode:
                ended = f"status {remote.returncode}" if remote.returncode > 0 else "a signal"
                fail(f"{ssh[0]} ended with {ended}")
    finally:
        while ours:
            os.close(ours.pop())


def _leave(remote: "subprocess.Popen[bytes]", *, is_over: bool) -> None:
    """Wait until ssh has ended, but not for long.

    If it `is_over`, nobody needs it. Else this command was interrupted, or the VM is there; ssh
    ends when the daemons have told each other all.
    """
    try:
        remote.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        if is_over:
            remote.terminate()


def _shown(event: Fields, name: str) -> str:
    return str(event["message"]) if (event["kind"], event["name"]) == ("migrating", name) else ""
