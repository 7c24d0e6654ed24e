"""Unpacking a tar stream of a guest's, which may hold anything, below a directory of this host.

Only regular files, directories and symbolic links are made, and only below that directory: each
part of a name is opened without following links, from the descriptor of the part in front of it, so
what the stream or the directory holds leads nowhere else. A symbolic link that leads out of the
tree is not made. Owners, special bits and times are not the guest's to say.

Source: POSIX.1-2017 pax, "pax Interchange Format" and "ustar"; GNU tar, "Basic Tar Format".
"""

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Self

from vmctl.client import CommandError

_BLOCK = 512
_EXTENDED_MAX = 64 << 10
"""Bytes of a long name or of a member's attributes."""
_DEPTH_MAX = 128
"""Directories in each other; each has an open descriptor meanwhile."""
_PIECE = 64 << 10
_SIZE_MAX = (1 << 63) - 1
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

FILE, DIRECTORY, LINK = b"0", b"5", b"2"


class Member(NamedTuple):
    """The header before a file's contents in a tar stream."""

    parts: tuple[bytes, ...]
    """Of its name; none is empty, `.` or `..`."""
    kind: bytes
    mode: int
    size: int
    target: bytes
    """Of a symbolic link."""


class TarReader:
    """Reads a tar stream; keeps one header and no contents."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        """Read by `read(size)`, which returns less only at the end."""
        self._read = read
        self._left = 0
        self._padding = 0

    def next(self) -> Member | None:
        """Return the next member, the rest of the one before skipped; None at the end.

        Raises:
            CommandError: it is no tar stream, or has a member that is not taken.
        """
        self._skip()
        name = target = None
        size = None
        while True:
            header = self._exactly(_BLOCK)
            if not any(header):
                while self._read(_PIECE):
                    pass
                return None
            kind, length = _checked(header)
            if kind in {b"x", b"L", b"K"}:
                data = self._extended(length)
                if kind == b"L":
                    name = data.split(b"\0")[0]
                elif kind == b"K":
                    target = data.split(b"\0")[0]
                else:
                    found = _records(data)
                    name, target = found.get(b"path", name), found.get(b"linkpath", target)
                    size = _decimal(found[b"size"]) if b"size" in found else size
                continue
            if kind == b"g":
                self._extended(length)
                continue
            break
        if name is None:
            prefix = _text(header[345:500]) if header[257:262] == b"ustar" else b""
            name = (prefix + b"/" if prefix else b"") + _text(header[:100])
        member = Member(
            _parts(name),
            kind,
            _number(header[100:108]) & 0o777,
            (length if size is None else size) if kind == FILE else 0,
            _text(header[157:257]) if target is None else target,
        )
        self._left = member.size
        self._padding = -member.size % _BLOCK
        return member

    def read(self) -> bytes:
        """Return some of the member's contents; empty at their end."""
        data = self._exactly(min(self._left, _PIECE))
        self._left -= len(data)
        return data

    def _skip(self) -> None:
        while self._left:
            self.read()
        self._exactly(self._padding)
        self._padding = 0

    def _extended(self, size: int) -> bytes:
        if size > _EXTENDED_MAX:
            raise CommandError("tar: a name is too long")
        data = self._exactly(size)
        self._exactly(-size % _BLOCK)
        return data

    def _exactly(self, size: int) -> bytes:
        data = self._read(size) if size else b""
        if len(data) < size:
            raise CommandError("tar: the stream ends too early")
        return data


def _checked(header: bytes) -> tuple[bytes, int]:
    """Return the kind and size of a header whose sum is right."""
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _number(header[148:156]) != total:
        raise CommandError("tar: not a tar stream")
    kind = header[156:157]
    if kind in {b"\0", b"7"}:
        kind = FILE
    if kind not in {FILE, DIRECTORY, LINK, b"x", b"g", b"L", b"K"}:
        raise CommandError(f"{_shown(_text(header[:100]))}: neither file, directory nor link")
    return kind, _number(header[124:136])


def _number(field: bytes) -> int:
    """Read a number: octal, or binary where the first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes((field[0] & 0x7F,)) + field[1:], "big")
    else:
        digits = field.strip(b" \0") or b"0"
        if set(digits) - set(b"01234567"):
            raise CommandError("tar: not a tar stream")
        value = int(digits, 8)
    if value > _SIZE_MAX:
        raise CommandError("tar: not a tar stream")
    return value


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 19 or int(digits) > _SIZE_MAX:
        raise CommandError("tar: not a tar stream")
    return int(digits)


def _text(field: bytes) -> bytes:
    return field.split(b"\0")[0]


def _records(data: bytes) -> dict[bytes, bytes]:
    """Read the attributes of a member: `length key=value`, a line each."""
    found = {}
    while data:
        length, _, _ = data.partition(b" ")
        size = _decimal(length)
        key, equals, value = data[len(length) + 1 : size - 1].partition(b"=")
        if not equals or size > len(data) or data[size - 1 : size] != b"\n":
            raise CommandError("tar: not a tar stream")
        found[key] = value
        data = data[size:]
    return found


def _parts(name: bytes) -> tuple[bytes, ...]:
    """Return the parts of a name.

    Raises:
        CommandError: it leads out of the tree.
    """
    parts = tuple(part for part in name.split(b"/") if part not in {b"", b"."})
    if name.startswith(b"/") or b".." in parts or b"\0" in name or len(parts) > _DEPTH_MAX:
        raise CommandError(f"{_shown(name)}: leads out of the tree")
    return parts


def _shown(name: bytes) -> str:
    return os.fsdecode(name)


def leads_out(parts: Sequence[bytes], target: bytes) -> bool:
    """Tell whether a symbolic link at `parts`, of which the first is the tree, leaves that tree.

    `..` may stand at the beginning alone: behind a part that is a link itself it means what only
    that link says.
    """
    if not target or target.startswith(b"/") or b"\0" in target:
        return True
    steps = [step for step in target.split(b"/") if step not in {b"", b"."}]
    up = 0
    while up < len(steps) and steps[up] == b"..":
        up += 1
    return up > len(parts) - 2 or b".." in steps[up:]


class Tree:
    """A directory of this host below which members are made; a context manager."""

    def __init__(self, folder: str, first: str | None) -> None:
        """Make members in `folder`.

        `first` replaces the first part of each name; with None, members are made without theirs.
        """
        self._first = None if first is None else os.fsencode(first)
        mask = os.umask(0)
        os.umask(mask)
        self._mask = ~mask
        self._top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._open: list[tuple[bytes, int]] = []
        self._modes: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._leave(0)
        os.close(self._top)

    def add(self, member: Member, read: Callable[[], bytes]) -> str:
        """Make a member; returns why it was left out, in a line, or nothing.

        Raises:
            CommandError: a link, or something else that is no directory, is in the way.
            OSError: of the file system; the file name is the member's.
        """
        if not member.parts:
            raise CommandError("tar: a member without a name")
        inner = member.parts[1:]
        parts = inner if self._first is None else (self._first, *inner)
        if not parts:
            if member.kind != DIRECTORY:
                raise CommandError(f"{_shown(member.parts[0])}: not a directory")
            return ""
        name = _shown(b"/".join(parts))
        try:
            if member.kind == DIRECTORY:
                if self._enter(parts, is_made=True):
                    self._modes[len(parts)] = member.mode & self._mask
                return ""
            self._enter(parts[:-1], is_made=False)
            if member.kind == LINK:
                # Without its first part the tree is the folder itself.
                within = parts if self._first is not None else (b"", *parts)
                if leads_out(within, member.target):
                    return f"{name}: left out: it leads out of what is copied"
                self._remove(parts[-1])
                os.symlink(member.target, parts[-1], dir_fd=self._folder)
            else:
                self._write(parts[-1], member.mode & self._mask, read)
        except OSError as err:
            if err.errno in {errno.ELOOP, errno.ENOTDIR}:
                raise CommandError(f"{name}: a link or a file is in the way") from None
            raise OSError(err.errno, err.strerror, name) from None
        return ""

    @property
    def _folder(self) -> int:
        return self._open[-1][1] if self._open else self._top

    def _enter(self, parts: Sequence[bytes], *, is_made: bool) -> bool:
        """Have the directory of this name open; tells whether its last part was made."""
        is_new = False
        same = 0
        while same < min(len(parts), len(self._open)) and self._open[same][0] == parts[same]:
            same += 1
        self._leave(same)
        for number, part in enumerate(parts[same:], same + 1):
            if is_made and number == len(parts):
                with suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=self._folder)
                    is_new = True
            self._open.append((part, os.open(part, _DIRECTORY, dir_fd=self._folder)))
        return is_new

    def _leave(self, count: int) -> None:
        """Close all but the first directories, which have their modes from then on."""
        while len(self._open) > count:
            mode = self._modes.pop(len(self._open), None)
            _, fd = self._open.pop()
            try:
                if mode is not None:
                    os.fchmod(fd, mode)
            finally:
                os.close(fd)

    def _remove(self, name: bytes) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._folder)

    def _write(self, name: bytes, mode: int, read: Callable[[], bytes]) -> None:
        try:
            found = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            pass
        else:
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self._remove(name)
        fd = os.open(name, _NEW, 0o600, dir_fd=self._folder)
        try:
            while data := read():
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
            os.fchmod(fd, mode)
        except BaseException:
            self._remove(name)
            raise
        finally:
            os.close(fd)


def unpack(read: Callable[[int], bytes], folder: str, first: str | None) -> list[str]:
    """Unpack a stream into `folder`; returns lines about omissions, at most a hundred.

    Raises:
        CommandError: of the stream, or something is in the way.
        OSError: of the file system.
    """
    left_out: list[str] = []
    reader = TarReader(read)
    with Tree(folder, first) as tree:
        while (member := reader.next()) is not None:
            line = tree.add(member, reader.read)
            if line and len(left_out) < _LINES_MAX:
                left_out.append(line)
    return left_out


_LINES_MAX = 100
