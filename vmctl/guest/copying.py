"""`vmctl cp`: files and directories into a guest and out of it, by its agent.

The guest does not decide the names of files on this side: see `vmctl.guest.unpack`. A copy is whole
only if the agent says so; a file appears under its name when it is.
"""

import io
import os
import stat
import tarfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmctl.client import CommandError
from vmctl.guest.access import agent_of
from vmctl.guest.agent import Agent, Session
from vmctl.guest.frames import PIECE
from vmctl.guest.unpack import unpack
from vmctl.messages import fail, warn
from vmctl.signals import cleaning_up
from vmm_kvm.new_file import NewFile
from vmm_kvm.standard_streams import OutputError

_STREAM = "-"
_NEW_MODE = 0o644


class _Place(NamedTuple):
    """The source or the target of a copy."""

    path: str
    guest: str = ""
    """The guest; empty for this host."""


def copy(words: Sequence[str], *, recursive: bool = False) -> int:
    """Copy between this host and a guest; returns the exit status."""
    try:
        source, target = (_place(word) for word in words)
        if bool(source.guest) == bool(target.guest):
            return fail("one of the two has to be in a guest: id:path")
        with cleaning_up():
            if target.guest:
                _copy_in(agent_of(target.guest), source.path, target.path, recursive)
                return 0
            left_out = _copy_out(agent_of(source.guest), source.path, target.path, recursive)
    except OSError as err:
        name = os.fsdecode(err.filename) if isinstance(err.filename, str | bytes) else ""
        return fail(f"{name}: {err.strerror}" if name else str(err.strerror or err))
    except CommandError as err:
        return fail(err)
    for line in left_out:
        warn(line)
    return 1 if left_out else 0


def _place(word: str) -> _Place:
    """Read an operand: `id:path` is in a guest, unless there is a slash in front of the colon.

    There may be one in the path of a VM's vsock socket.
    """
    guest, colon, path = word.partition(":")
    while colon and "/" in guest and not _is_socket(guest):
        more, colon, path = path.partition(":")
        guest = f"{guest}:{more}"
    if not colon or not guest:
        if not word:
            raise CommandError("a name is empty")
        return _Place(word)
    if not path:
        raise CommandError(f"{word}: there is no path behind the colon")
    return _Place(path, guest)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


# Into a guest


def _copy_in(agent: Agent, source: str, path: str, is_recursive: bool) -> None:
    if source == _STREAM:
        form = {"form": "tar", "into": True} if is_recursive else {"form": "file"}
        fields: dict[str, object] = {"path": path, "mode": _NEW_MODE, **form}
        with agent.open("put", None, **fields) as session:
            _send(session, lambda size: os.read(0, size))
        return
    if is_recursive:
        copy_tree_in(agent, source, path)
    else:
        copy_file_in(agent, source, path)


def copy_file_in(agent: Agent, source: str, path: str) -> None:
    """Copy a file of this host to `path` in a guest, or into the directory that is there.

    Raises:
        CommandError: the agent does not take it.
        OSError: it cannot be read.
    """
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            raise CommandError(f"{source}: is a directory: -r copies it")
        with agent.open(
            "put",
            None,
            form="file",
            path=path,
            name=_base(source),
            mode=stat.S_IMODE(found.st_mode) & 0o777,
        ) as session:
            _send(session, lambda size: os.read(fd, size))
    finally:
        os.close(fd)


def _send(session: Session, read: Callable[[int], bytes]) -> None:
    while session.result is None and (data := read(PIECE)):
        session.write(data)
    session.end_input()
    session.finish()


def copy_tree_in(agent: Agent, source: str, path: str) -> None:
    """Copy a directory of this host to `path` in a guest, or into the directory that is there.

    Raises:
        CommandError: the agent does not take it.
        OSError: something of it cannot be read.
    """
    os.stat(source)
    name = _base(source)
    with agent.open("put", None, form="tar", path=path, name=name) as session:
        try:
            with tarfile.open(fileobj=_Writer(session), mode="w|", bufsize=PIECE) as archive:
                _pack(archive, os.fsencode(source), os.fsencode(name), is_followed=True)
        except tarfile.TarError as err:
            raise CommandError(f"tar: {err}") from None
        session.end_input()
        session.finish()


def copy_contents_in(agent: Agent, source: str, path: str) -> None:
    """Copy all that is in a directory of this host into the directory `path` of a guest.

    Raises:
        CommandError: the agent does not take it.
        OSError: something of it cannot be read.
    """
    names = sorted(os.listdir(os.fsencode(source)))
    with agent.open("put", None, form="tar", path=path, into=True) as session:
        try:
            with tarfile.open(fileobj=_Writer(session), mode="w|", bufsize=PIECE) as archive:
                for name in names:
                    place = os.path.join(os.fsencode(source), name)
                    _pack(archive, place, name, is_followed=False)
        except tarfile.TarError as err:
            raise CommandError(f"tar: {err}") from None
        session.end_input()
        session.finish()


class _Writer(io.BufferedIOBase):
    """A session's input as a writable file."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def write(self, data: bytes, /) -> int:  # type: ignore[override] # nothing else is written
        return self._session.write(data)


def _pack(archive: tarfile.TarFile, path: bytes, name: bytes, *, is_followed: bool) -> None:
    """Add files, directories and symbolic links; others, such as sockets, are left out."""
    found = os.stat(path, follow_symlinks=is_followed)
    member = tarfile.TarInfo(os.fsdecode(name))
    member.mode = stat.S_IMODE(found.st_mode) & 0o777
    member.mtime = int(found.st_mtime)
    if stat.S_ISDIR(found.st_mode):
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
        for one in sorted(os.listdir(path)):
            _pack(archive, path + b"/" + one, name + b"/" + one, is_followed=False)
    elif stat.S_ISLNK(found.st_mode):
        member.type = tarfile.SYMTYPE
        member.linkname = os.fsdecode(os.readlink(path))
        archive.addfile(member)
    elif stat.S_ISREG(found.st_mode):
        with open(path, "rb") as file:
            member.size = os.fstat(file.fileno()).st_size
            archive.addfile(member, file)


def _base(path: str) -> str:
    """Return the name of a copy of `path`."""
    name = os.path.basename(path.rstrip("/"))
    return (
        name if name not in {"", ".", ".."} else os.path.basename(os.path.realpath(path)) or "root"
    )


# Out of a guest


def _copy_out(agent: Agent, path: str, target: str, is_recursive: bool) -> list[str]:
    if target == _STREAM:
        if is_recursive and os.isatty(1):
            raise CommandError("standard output is a terminal: redirect it to a file or a command")
        with agent.open("get", None, path=path, form="tar" if is_recursive else "file") as session:
            _receive(session, _write_output)
        return []
    if is_recursive:
        return copy_tree_out(agent, path, target)
    copy_file_out(agent, path, target)
    return []


def copy_file_out(agent: Agent, path: str, target: str) -> None:
    """Copy a file of a guest to `target` on this host, or into the directory that is there.

    Raises:
        CommandError: the agent does not give it, or not all of it.
        OSError: it cannot be written.
    """
    if os.path.isdir(target):
        target = os.path.join(target, _name_of(path))
    with agent.open("get", None, path=path, form="file") as session:
        if os.path.exists(target) and not os.path.isfile(target):
            fd = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
            try:
                _receive(session, lambda data: _write(fd, data))
            finally:
                os.close(fd)
            return
        target = os.path.realpath(target)
        mode = session.started.get("mode")
        mode = mode & 0o777 if type(mode) is int else _NEW_MODE
        if os.path.exists(target):
            mode = stat.S_IMODE(os.stat(target).st_mode)
        mask = os.umask(0)
        os.umask(mask)
        with NewFile(target, mode=mode & ~mask, replaces=os.path.exists(target)) as new:
            _receive(session, lambda data: _write(new.fd, data))
            new.publish(durable=False)


def copy_tree_out(agent: Agent, path: str, target: str) -> list[str]:
    """Copy a directory of a guest to `target` on this host, or into the directory that is there.

    Returns lines about omitted files: links that lead out of the copied directory.

    Raises:
        CommandError: the agent does not give it, or not all of it, or it is not taken.
        OSError: it cannot be written.
    """
    first: str | None
    if os.path.isdir(target):
        folder, first = target, os.path.basename(path.rstrip("/"))
        if first in {"", ".", ".."}:  # the directory's contents
            first = None
    else:
        folder, first = os.path.split(target.rstrip("/") or "/")
    with agent.open("get", None, path=path, form="tar") as session:
        left_out = unpack(session.read, folder or ".", first)
        session.finish()
    return left_out


def _name_of(path: str) -> str:
    name = os.path.basename(path)
    if name in {"", ".", ".."}:
        raise CommandError(f"{path}: not the name of a file")
    return name


def _receive(session: Session, write: Callable[[bytes], None]) -> None:
    while data := session.read(PIECE):
        write(data)
    session.finish()


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _write_output(data: bytes) -> None:
    try:
        _write(1, data)
    except OSError as err:
        raise OutputError from err
