"""Files that appear under their names when they are whole, and never before.

Where the file system can, a file has no name at all until it is published: whatever ends the
process, SIGKILL included, leaves nothing. Elsewhere (FAT, NFS, some of FUSE) it lies beside its
place as `.NAME.HEX.part` until then, which only a killed process or host leaves behind.

Source: open(2) "O_TMPFILE", linkat(2).
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from errno import EEXIST, EINVAL, EISDIR, ENOSYS, EOPNOTSUPP, EPERM
from typing import Self

# EPERM is overlayfs' answer in a directory that was removed: the other way says what is wrong.
_NO_UNNAMED_FILES = {EOPNOTSUPP, EISDIR, EINVAL, ENOSYS, EPERM}
_NO_LINKS = {EPERM, EOPNOTSUPP, EINVAL, ENOSYS}
_NAME_BYTES = 200
"""Of the file's name that its temporary one repeats; a name has at most 255 bytes."""


class NewFile:
    """A file that is being made; a context manager, which removes an unpublished file.

    The descriptor `fd`, for reading and writing, is open inside the block and belongs to it.
    """

    __slots__ = ("_directory", "_is_unnamed", "_mode", "_name", "_replaces", "_temporary", "fd")

    def __init__(self, path: str, *, mode: int = 0o600, replaces: bool = False) -> None:
        """Make a file that is to appear at `path`, in a directory that exists.

        A file that is there already stays, and `publish` fails, unless it `replaces` that file.
        """
        directory, self._name = os.path.split(path)
        self._directory = directory or "."
        self._mode = mode
        self._replaces = replaces
        self._is_unnamed = False
        self._temporary = ""
        self.fd = -1

    def __enter__(self) -> Self:
        """Make the file, as yet without its name.

        Raises:
            OSError: its directory is missing or takes no file, or there is a file of that name.
            ValueError: there is a null character in the path.
        """
        if self._name in {"", ".", ".."}:
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR), self._path())
        try:
            if not self._replaces:
                self._check_absence()
                self._open_unnamed()
            if self.fd < 0:
                self._open_temporary()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._remove()

    def publish(self, *, durable: bool = True) -> None:
        """Give the file its name, once its contents are durable.

        Without `durable` a crash of the host may leave an incomplete file under its name.

        Raises:
            OSError: EEXIST if a file of that name was made meanwhile, or an I/O fault.
        """
        if durable:
            os.fsync(self.fd)
        if self._replaces:
            os.rename(self._temporary, self._path())  # noqa: PTH104 - commands start without pathlib
            self._temporary = ""
        elif self._is_unnamed:
            self._link(f"/proc/self/fd/{self.fd}")
        else:
            self._publish_temporary()

    def _publish_temporary(self) -> None:
        try:
            self._link(self._temporary)
        except OSError as err:
            if err.errno not in _NO_LINKS:
                raise
            # An empty file reserves the name; no disk image is empty.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            os.close(os.open(self._path(), flags, self._mode))
            os.rename(self._temporary, self._path())  # noqa: PTH104 - as above
            self._temporary = ""

    def _link(self, source: str) -> None:
        directory = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # With a descriptor of a directory, Python calls linkat, which follows the source.
            os.link(source, self._name, dst_dir_fd=directory)
        finally:
            os.close(directory)

    def _check_absence(self) -> None:
        with suppress(FileNotFoundError):
            os.lstat(self._path())
            raise FileExistsError(EEXIST, os.strerror(EEXIST), self._path())

    def _open_unnamed(self) -> None:
        flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
        try:
            self.fd = os.open(self._directory, flags, self._mode)
        except OSError as err:
            if err.errno not in _NO_UNNAMED_FILES:
                raise
            return
        if os.path.exists(f"/proc/self/fd/{self.fd}"):  # noqa: PTH110 - as above
            self._is_unnamed = True
        else:  # without /proc it could get no name
            os.close(self.fd)
            self.fd = -1

    def _open_temporary(self) -> None:
        name = os.fsdecode(os.fsencode(self._name)[:_NAME_BYTES])
        # Known before the file is made: a signal's exception may come in between.
        self._temporary = os.path.join(  # noqa: PTH118 - as above
            self._directory, f".{name}.{os.urandom(8).hex()}.part"
        )
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self.fd = os.open(self._temporary, flags, self._mode)

    def _path(self) -> str:
        return os.path.join(self._directory, self._name)  # noqa: PTH118 - as above

    def _remove(self) -> None:
        if self._temporary:
            with suppress(FileNotFoundError):
                os.unlink(self._temporary)  # noqa: PTH108 - as above
            self._temporary = ""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def write_whole(fd: int, pieces: Sequence[bytes | memoryview]) -> None:
    """Append all of `pieces` to a file.

    Raises:
        OSError: the file cannot be written.
    """
    for piece in pieces:
        view = memoryview(piece)
        while view:
            view = view[os.write(fd, view) :]
