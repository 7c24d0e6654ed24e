"""`vmctl -H host`: vmctl there, through ssh.

This process becomes ssh: the exit status is that of vmctl there, or 255 without a connection, and
signals, standard streams and the terminal are ssh's. Descriptors pass no forwarded socket, so a
command that opens files opens them there.
"""

import os
import shlex
from collections.abc import Mapping, Sequence

from vmctl.client import CommandError
from vmctl.messages import fail

EXIT_NO_CONNECTION = 255
_SSH = "VMCTL_SSH"
_READERS = ("connect", "console", "cp", "exec", "receive", "run", "ssh", "start")
"""Verbs that may read standard input; ssh keeps it from all others."""


def remote(words: Sequence[str]) -> int:
    """Run vmctl at a host; `words` are the host, the verb in full, and the command line there."""
    host, verb, *arguments = words
    try:
        command = command_for(host, verb, arguments, os.environ)
    except (CommandError, ValueError) as err:
        return fail(err)
    try:
        os.execvp(command[0], command)  # noqa: S606 - the point is that no shell reads it here
    except OSError as err:
        fail(f"{command[0]}: {err.strerror}")
    return EXIT_NO_CONNECTION


def command_for(
    host: str, verb: str, arguments: Sequence[str], environ: Mapping[str, str]
) -> list[str]:
    """Return the command that runs vmctl with these arguments at a host.

    Raises:
        CommandError: ssh would take the host for an option, or there is no command.
        ValueError: a quotation of VMCTL_SSH does not end.
    """
    if not host or host.startswith("-"):
        raise CommandError(f"invalid host: {host}")
    command = shlex.split(environ.get(_SSH) or "ssh")
    if not command or not command[0]:
        raise CommandError(f"invalid {_SSH}: no command")
    if os.isatty(0) and os.isatty(1):
        command.append("-t")
    else:
        command += ["-T"] if verb in _READERS else ["-T", "-n"]
    return [*command, "--", host, f"exec {shlex.join(('vmctl', *arguments))}"]
