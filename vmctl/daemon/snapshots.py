"""`vmctl snapshot`, and `start --from`: VMs as files, to start any number of times.

A snapshot is in the daemon's store, under a name, or in a file of the user's: a word with a slash
in it is a path. The daemon writes a user's file through a descriptor that was opened here, and the
file has its name when it is complete.
"""

import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vmctl.client import Client, CommandError, Fields, RefusedError, check_name, parse_target
from vmctl.daemon.awaiting import await_done
from vmctl.daemon.transfer import request_of
from vmctl.messages import fail
from vmctl.moment import moment
from vmd.config.sizes import fmt_scaled
from vmm_kvm.errors import SnapshotError, VmmError
from vmm_kvm.limits import NAME_MAX
from vmm_kvm.new_file import NewFile
from vmm_kvm.snapshot import state as states
from vmm_kvm.snapshot.file import SnapshotFile
from vmm_kvm.text import printable

if TYPE_CHECKING:
    from vmm_kvm.snapshot.manifest import Manifest

_BAR = 40  # characters
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid


def snapshot(
    words: Sequence[str],
    *,
    listed: bool = False,
    removed: str = "",
    described: str = "",
    checked: str = "",
    output: str = "",
    no_disks: bool = False,
    as_json: bool = False,
) -> int | None:
    """Make a snapshot of a VM, or work on existing ones; returns the status."""
    others = [bool(removed), bool(described), bool(checked), listed]
    if sum(others) > 1 or bool(words) == any(others) or (any(others) and (output or no_disks)):
        return None
    if as_json and not (described or checked or listed):
        return None
    try:
        if listed:
            _list(as_json=as_json)
        elif removed:
            _check_stored(removed)
            with Client() as client:
                client.ask("remove-snapshot", "done", {"snapshot": removed})
        elif described or checked:
            _tell(described or checked, is_check=bool(checked), as_json=as_json)
        else:
            return _make(words, output, no_disks=no_disks)
    except RefusedError as err:
        return fail(f"snapshot command failed: {err}")
    except (CommandError, VmmError) as err:
        return fail(err)
    return 0


def _make(words: Sequence[str], output: str, *, no_disks: bool) -> int | None:
    target = parse_target(words[0])
    if output and len(words) > 1:
        return None
    if len(words) > 1:
        _check_stored(words[1])
    fields: Fields = {**target.fields(), "without_disks": no_disks}
    with Client() as client:
        if output:
            with _new_file(output) as new:
                answer = _ask(client, {**fields, "file": 0}, [new.fd])
                new.publish(durable=False)  # the daemon has seen to that
            made = output
        else:
            made = words[1] if len(words) > 1 else _made_name(client, target.fields())
            answer = _ask(client, {**fields, "snapshot": made}, [])
    print(f"vmctl: made snapshot {printable(made)} of vm {answer['id']}", file=sys.stderr)
    return 0


def _check_stored(name: str) -> None:
    """Refuse a name that is too long for a snapshot; the daemon refuses other ones.

    Raises:
        CommandError: it is.
    """
    if len(name) > NAME_MAX:
        raise CommandError("snapshot name too long")


def _ask(client: Client, fields: Fields, fds: Sequence[int]) -> Fields:
    """Ask for a snapshot; a terminal is shown how far it is. Returns the answer."""
    if not sys.stderr.isatty():
        return client.ask("snapshot", "done", fields, fds)
    with Client() as events:
        events.ask("events", "done")
        client.send("snapshot", fields, fds)
        return await_done(client, events, lambda event: _bar(event, fields))


def _bar(event: Fields, asked: Fields) -> str:
    if event["kind"] != "writing" or asked.get("name", event["name"]) != event["name"]:
        return ""
    if asked.get("id", event["id"]) != event["id"]:
        return ""
    percent = str(event["message"]).removesuffix("%")
    done = int(percent) * _BAR // 100 if percent.isdecimal() else 0
    return f"{event['name']} [{'#' * done}{'.' * (_BAR - done)}] {event['message']}"


def _made_name(client: Client, target: Fields) -> str:
    """Return a default name for a snapshot: the VM's, and the time."""
    vms = client.ask("status", "vms", target)["vms"]
    if not vms:
        raise CommandError("vm not found")
    ending = time.strftime("-%Y%m%d-%H%M%S", time.gmtime())
    return f"{vms[0]['name'][: NAME_MAX - len(ending)]}{ending}"


@contextmanager
def _new_file(path: str) -> Iterator[NewFile]:
    try:
        with NewFile(path) as new:
            yield new
    except OSError as err:
        raise CommandError(f"{path}: {err.strerror}") from err


def _list(*, as_json: bool) -> None:
    with Client() as client:
        found = client.ask("snapshots", "snapshot-list")["snapshots"]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    header = ("NAME", "SIZE", "MADE")
    rows = [(one["name"], fmt_scaled(one["size"]), moment(one["created_at"])) for one in found]
    if sys.stdout.isatty():
        from vmctl.screen.table import show_table  # noqa: PLC0415 - only people see it

        show_table(header, rows)
        return
    for name, size, made in (header, *rows):
        print(f"{printable(name):32} {size:>7} {made}")


def _open(origin: str) -> int:
    """Open a snapshot of the store, or a file; returns the descriptor."""
    if "/" in origin:
        try:
            return os.open(origin, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as err:
            raise CommandError(f"{origin}: {err.strerror}") from err
    _check_stored(origin)
    with Client() as client:
        client.send("open-snapshot", {"snapshot": origin})
        answer, fds = client.receive("snapshot-opened")
    index = answer["file"]
    for at, fd in enumerate(fds):
        if at != index:
            os.close(fd)
    if not 0 <= index < len(fds):
        raise CommandError("unexpected response received from vmd")
    return fds[index]


@contextmanager
def _opened(origin: str) -> Iterator[tuple[SnapshotFile, int]]:
    """Yield a snapshot, and its descriptor."""
    fd = _open(origin)
    try:
        with SnapshotFile(fd) as file:
            yield file, fd
    except SnapshotError as err:
        raise CommandError(f"{origin}: {err}") from err
    except OSError as err:
        if isinstance(err, VmmError):
            raise
        raise CommandError(f"{origin}: {err.strerror}") from err


def disks_of(origin: str) -> list[str]:
    """Return the paths of the disks of a snapshot.

    Raises:
        CommandError: it cannot be read.
    """
    with _opened(origin) as (file, _fd):
        return [disk.path for disk in file.manifest.disks]


def _tell(origin: str, *, is_check: bool, as_json: bool) -> None:
    """Describe a snapshot; for a damaged one print the error."""
    with _opened(origin) as (file, fd):
        facts = _facts(file.manifest, os.fstat(fd))
        if is_check:
            state = states.decode(file.state)
            facts |= {"parts": len(state.parts), "blobs": len(state.blobs)}
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        text = ", ".join(value) if isinstance(value, list) else "" if value is None else str(value)
        print(f"{name.replace('_', ' ')}: {printable(text)}".rstrip())


def _facts(manifest: "Manifest", status: os.stat_result) -> dict[str, str | int | list[str] | None]:
    return {
        "vm": manifest.name,
        "made": moment(manifest.created_ns / 1e9),
        "memory": manifest.memory_size,
        "cpus": manifest.cpus,
        "file_size": status.st_size,
        "disk_size": status.st_blocks * 512,
        "disks": [disk.path for disk in manifest.disks],
        "cdrom": manifest.cdrom,
        "interfaces": [each.lladdr for each in manifest.interfaces],
        "host_kernel": manifest.host.kernel,
    }


def _daemon_uid(client: Client) -> int:
    """Return the owner of the daemon's socket."""
    with socket.socket(fileno=os.dup(client.fileno())) as connection:
        size = _CREDENTIALS.size
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(_CREDENTIALS.unpack(data)[1])


def _is_like(client: Client, name: str, source: str) -> bool:
    """Tell whether the VM called `name` is as one that the daemon has.

    It is the VM of that name, or for users other than root like the one called `source`.
    """
    if client.ask("status", "vms", {"name": name})["vms"]:
        return True
    is_administrator = os.geteuid() in {0, _daemon_uid(client)}
    return not is_administrator and bool(client.ask("status", "vms", {"name": source})["vms"])


def start_from(client: Client, name: str, origin: str, *, clock: str = "") -> Fields:
    """Start a VM called `name` from a snapshot; returns the daemon's answer.

    Raises:
        CommandError: there is no such snapshot, something of it is missing, or the daemon refuses.
    """
    check_name(name)
    fds: list[int] = []
    try:
        with _opened(origin) as (file, fd):
            fds.append(os.dup(fd))
            source = file.manifest.name
            fields = {
                **request_of(file.manifest, fds, is_like=_is_like(client, name, source)),
                "source": source,
                "name": name,
                "stream": 0,
                "manifest": file.text.decode(),
                "is_snapshot": True,
                "is_copy": True,
            }
            # The user who starts it owns it, not the source's owner.
            del fields["uid"], fields["gid"]
            if clock:
                fields["clock"] = clock
            return client.ask("receive", "started", fields, fds)
    finally:
        for each in fds:
            os.close(each)
