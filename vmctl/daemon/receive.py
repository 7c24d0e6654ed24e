"""`vmctl receive`: a VM out of a stream.

The daemon reads standard input itself: nothing is copied here, but the beginning of the stream,
which says what the VM needs of this host.

Source: section 3.10 of OpenBSD's behaviour.
"""

import os
from collections.abc import Sequence
from contextlib import suppress

from vmctl.client import Client, CommandError, RefusedError, check_name, parse_target
from vmctl.daemon.starting import say_started, why_not_started
from vmctl.daemon.transfer import SENDER_PATIENCE_S, check_disks, request_of
from vmctl.messages import fail
from vmm_kvm.errors import SnapshotError
from vmm_kvm.snapshot.fds import FdSource
from vmm_kvm.snapshot.handover import failed
from vmm_kvm.snapshot.stream import StreamReader

_STDIN, _STDOUT = 0, 1


def receive(
    words: Sequence[str],
    *,
    stays_paused: bool = False,
    is_handed_over: bool = False,
    copies_storage: bool = False,
) -> int:
    """Receive a VM from standard input; returns the exit status.

    One that `is_handed_over` runs when its sender has let go of it, which hears by standard output
    how far that is. With `copies_storage` its disks may come along.
    """
    if copies_storage:
        return _receive_with_storage(
            words[0], stays_paused=stays_paused, is_handed_over=is_handed_over
        )
    fds: list[int] = []
    try:
        name = _name(words[0])
        reader = _begin()
        fds.append(os.dup(_STDIN))
        fields = {
            **request_of(reader.manifest, fds),
            "name": name,
            "stream": 0,
            "manifest": reader.text.decode(),
            "stays_paused": stays_paused,
        }
        if is_handed_over:
            check_disks(reader.manifest, fields, fds)
            fields["replies"] = len(fds)
            fds.append(os.dup(_STDOUT))
        with Client() as client:
            answer = client.ask("receive", "started", fields, fds)
    except RefusedError as err:
        why = why_not_started(err)
        return _failed(why) if is_handed_over else fail(why)
    except CommandError as err:
        return fail(err)
    finally:
        for fd in fds:
            os.close(fd)
    say_started(answer)
    return 0


def _receive_with_storage(word: str, *, stays_paused: bool, is_handed_over: bool) -> int:
    from vmctl.daemon.storage import receive_with_storage  # noqa: PLC0415 - seldom

    try:
        name = _name(word)
    except CommandError as err:
        return fail(err)
    if not is_handed_over:
        return fail("disks come along only with --live")
    if os.isatty(_STDIN):
        return fail("standard input is a terminal: receive from a pipe")
    return receive_with_storage(name, stays_paused=stays_paused)


def _failed(why: str) -> int:
    """Tell the sender that its VM does not run here, and never will; its process is gone."""
    with suppress(OSError):  # the sender is gone, or has given up
        os.write(_STDOUT, failed(why.replace("\n", ": ")))
    return fail(why)


def _name(word: str) -> str:
    """Return the name of a VM; an id is none."""
    if parse_target(word).id or (word.isascii() and word.isdecimal()):
        raise CommandError(f"invalid id: {word}")
    check_name(word)
    return word


def _begin() -> StreamReader:
    """Read the beginning of the stream, and not one byte more."""
    if os.isatty(_STDIN):
        raise CommandError("standard input is a terminal: receive from a file or a pipe")
    try:
        with FdSource(os.dup(_STDIN), SENDER_PATIENCE_S) as source:
            return StreamReader(source)
    except OSError as err:
        raise CommandError(f"standard input: {err.strerror}") from err
    except SnapshotError as err:
        raise CommandError(f"standard input: {err}") from err
