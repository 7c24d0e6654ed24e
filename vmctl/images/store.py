"""The store of pulled images: files named by their digests, and names that lead to them.

    sha512-HEX, sha256-HEX   the images, which are only read
    names/NAME               a symbolic link to one of them
    partial/sha512-HEX       one that is being pulled, locked meanwhile, or was not to its end
    partial/sha512-HEX-disk  the disk that is being unpacked from that layer of a container's image
    layers/sha512-HEX        a symbolic link to the image that was in such a layer
    overlays                 disks that were made on an image, which therefore stays
    overlays-of-others/      in root's store: a file for each that another user has made; users can
                             put some there, and neither list them nor take others away

A file gets its place by renaming it, when it is whole and has the digest of its name.
"""

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from vmctl.images.sources import check_name
from vmd.config.disks import DiskKind, DiskOption, writes_image
from vmm_kvm.absolute import absolute
from vmm_kvm.errors import ImageError, SpecError
from vmm_kvm.text import printable

PREFIX = "image:"
"""In front of a name of the store, where a disk is wanted."""
_SYSTEM = "/var/lib/vmm-kvm/images"
_DIGEST = re.compile(r"(sha256-[0-9a-f]{64}|sha512-[0-9a-f]{128})", re.ASCII)
_PARTIAL = re.compile(rf"{_DIGEST.pattern}(-disk)?", re.ASCII)
_POLL_S = 0.2
_OVERLAYS_MAX = 16 << 20
_OTHERS = "overlays-of-others"
_OTHERS_MODE = 0o1733
_OTHERS_MAX = 65536
_PATH_MAX = 4096
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})
"""What the kernel says of a path where there is nothing; after others nobody knows."""


class Stored(NamedTuple):
    """An image of the store."""

    digest: str
    """Name of its file: algorithm, minus, hexadecimal digits."""
    names: tuple[str, ...]
    size: int
    pulled: float
    """When; seconds since 1970."""


def _own() -> str:
    """Return the directory of this user's store."""
    if chosen := os.environ.get("VMCTL_IMAGES"):
        return absolute(chosen)
    if not os.geteuid():
        return _SYSTEM
    base = os.environ.get("XDG_DATA_HOME", "")
    base = base if os.path.isabs(base) else os.path.expanduser("~/.local/share")
    return os.path.join(base, "vmm-kvm", "images")


def snapshots_directory() -> str:
    """Return the directory of this user's snapshots for a fleet, a store like that of images."""
    base = os.environ.get("XDG_DATA_HOME", "")
    base = base if os.path.isabs(base) else os.path.expanduser("~/.local/share")
    return os.path.join(base, "vmm-kvm", "snapshots")


def find(name: str) -> str:
    """Return the path of an image: of this user's, or else of the system's store.

    Raises:
        SpecError: there is none of that name.
    """
    check_name(name)
    for directory in dict.fromkeys((_own(), _SYSTEM)):
        digest = _target(directory, name)
        if digest and os.path.isfile(path := os.path.join(directory, digest)):
            return path
    raise SpecError(f"{PREFIX}{name}: there is no such image: 'vmctl image pull {name}' gets it")


def stored_path(path: str) -> str:
    """Return the path of an image that is named with `image:`, and any other path as it is.

    Raises:
        SpecError: there is none of that name.
    """
    return find(path.removeprefix(PREFIX)) if path.startswith(PREFIX) else path


def stored_disk(disk: DiskOption) -> DiskOption:
    """Return a disk with the path of the image that `image:` names, if it is such.

    Raises:
        SpecError: there is none, or the guest would write to it.
    """
    if disk.kind is not DiskKind.PROBE or not disk.path.startswith(PREFIX):
        return disk
    path = stored_path(disk.path)
    if writes_image(disk):
        raise SpecError(
            f"{disk.path}: images of the store are not written: add ,snapshot or ,ro,"
            f" or make an overlay: vmctl create -b {disk.path} disk.qcow2"
        )
    return disk._replace(path=path)


def _target(directory: str, name: str) -> str:
    """Return the digest that a name stands for; empty if it is none."""
    return _linked(directory, "names", name)


def _linked(directory: str, folder: str, name: str) -> str:
    try:
        target = os.readlink(os.path.join(directory, folder, name))
    except OSError:
        return ""
    digest = target.removeprefix("../")
    return digest if _DIGEST.fullmatch(digest) else ""


class ImageStore:
    """This user's store."""

    def __init__(self, directory: str = "") -> None:
        """Know its place; missing directories are made when they are needed."""
        self.directory = directory or _own()

    def path(self, digest: str) -> str:
        """Return where the image of a digest is, or will be."""
        return os.path.join(self.directory, digest)

    def digest(self, name: str) -> str:
        """Return the digest that a name stands for; empty if there is no such name."""
        return _target(self.directory, name)

    def held(self, digest: str) -> str:
        """Return the digest of the image that a download with this digest is, or has in it.

        It is empty if that image is not there.
        """
        for found in (digest, _linked(self.directory, "layers", digest)):
            if found and os.path.exists(self.path(found)):
                return found
        return ""

    def images(self) -> list[Stored]:
        """Return the images, sorted by name; those without a name come last.

        Raises:
            OSError: it cannot be read.
        """
        names: dict[str, list[str]] = {}
        for name in self._listed("names"):
            names.setdefault(self.digest(name), []).append(name)
        found = []
        for digest in self._listed(""):
            if _DIGEST.fullmatch(digest):
                status = os.stat(self.path(digest))
                own = tuple(sorted(names.get(digest, ())))
                found.append(Stored(digest, own, status.st_size, status.st_mtime))
        return sorted(found, key=lambda one: (not one.names, one.names, one.digest))

    def partials(self) -> list[str]:
        """Return the paths of partial images."""
        return [
            os.path.join(self.directory, "partial", name)
            for name in self._listed("partial")
            if _PARTIAL.fullmatch(name)
        ]

    def _listed(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(os.path.join(self.directory, folder)))
        except FileNotFoundError:
            return []

    @contextmanager
    def partial(self, digest: str, on_wait: Callable[[], None]) -> Iterator[int | None]:
        """Open the part of an image that was pulled, locked; None if the whole image is there.

        Another process that pulls it is waited for, after `on_wait`: it gives up by itself when
        nothing comes.

        Raises:
            OSError: it cannot be made.
        """
        folder = os.path.join(self.directory, "partial")
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, digest)
        has_told = False
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                while not _locked(fd):
                    if not has_told:
                        has_told = True
                        on_wait()
                    time.sleep(_POLL_S)
                if not _is_at(fd, path):  # the other one has put it into its place
                    continue
                if self.held(digest):
                    os.unlink(path)
                    yield None
                else:
                    yield fd
                return
            finally:
                os.close(fd)

    def drop(self, digest: str) -> None:
        """Remove the part of an image that was pulled, which is locked."""
        os.unlink(os.path.join(self.directory, "partial", digest))

    def publish(self, fd: int, digest: str, name: str) -> None:
        """Put the whole image at `fd`, which `partial` has yielded, into its place.

        Without a name the next prune removes it.

        Raises:
            OSError: it cannot be done.
        """
        self._publish(fd, digest, digest, name)

    @contextmanager
    def unpacked(self, layer: str) -> Iterator[int]:
        """Make the file for the disk in a layer, whose download is locked by `partial`.

        It is removed at the end, unless it has been published.

        Raises:
            OSError: it cannot be made.
        """
        path = os.path.join(self.directory, "partial", f"{layer}-disk")
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if not _is_at(fd, path):  # prune has removed it just now
                    continue
                try:
                    os.ftruncate(fd, 0)
                    yield fd
                finally:
                    with suppress(FileNotFoundError):
                        os.unlink(path)
                return
            finally:
                os.close(fd)

    def publish_layer(self, fd: int, layer: str, digest: str, name: str) -> None:
        """Put the disk at `fd`, which `unpacked` has yielded, into its place.

        Raises:
            OSError: it cannot be done.
        """
        self._publish(fd, f"{layer}-disk", digest, name)
        self._link("layers", layer, digest)

    def forget_layers(self) -> None:
        """Forget layers whose image is gone.

        Raises:
            OSError: it cannot be done.
        """
        for layer in self._listed("layers"):
            if not self.held(layer):
                os.unlink(os.path.join(self.directory, "layers", layer))

    def _publish(self, fd: int, part: str, digest: str, name: str) -> None:
        os.fchmod(fd, 0o444)
        os.fsync(fd)
        path = os.path.join(self.directory, "partial", part)
        with self.locked():
            if os.path.exists(self.path(digest)):  # from another layer, and maybe in use
                os.unlink(path)
            else:
                os.rename(path, self.path(digest))
            if name:
                self._name(name, digest)

    def name(self, name: str, digest: str) -> None:
        """Let a name stand for an image that is there.

        Raises:
            OSError: it cannot be done.
        """
        with self.locked():
            os.stat(self.path(digest))
            self._name(name, digest)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let no other process name images, or remove some.

        Raises:
            OSError: it cannot be done.
        """
        os.makedirs(self.directory, exist_ok=True)
        if self.directory == _SYSTEM:
            others = os.path.join(_SYSTEM, _OTHERS)
            with suppress(FileExistsError):
                os.mkdir(others)
                os.chmod(others, _OTHERS_MODE)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        fd = os.open(self.directory, flags)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _name(self, name: str, digest: str) -> None:
        self._link("names", name, digest)

    def _link(self, kind: str, name: str, digest: str) -> None:
        folder = os.path.join(self.directory, kind)
        os.makedirs(folder, exist_ok=True)
        new = os.path.join(folder, f".{name}.{os.urandom(8).hex()}")
        os.symlink(f"../{digest}", new)
        try:
            os.rename(new, os.path.join(folder, name))
        except BaseException:
            os.unlink(new)
            raise

    def unname(self, name: str) -> None:
        """Remove a name; its image stays.

        Raises:
            OSError: it cannot be removed.
        """
        os.unlink(os.path.join(self.directory, "names", name))

    def remove(self, digest: str) -> None:
        """Remove an image.

        Raises:
            OSError: it cannot be removed.
        """
        os.unlink(self.path(digest))

    def user(self, digest: str) -> str:
        """Return what needs an image, for a message; empty if nothing is known to.

        Raises:
            OSError: it cannot be read.
        """
        from vmm_kvm.block.locks import lock  # noqa: PLC0415 - only to remove one

        path = self.path(digest)
        for overlay in _overlays(self.directory):
            if _base_of(overlay) == path:
                return f"{os.fsdecode(overlay)} is an overlay on it"
        for overlay, uid in _overlays_of_others(self.directory):
            try:
                is_needed = _base_of_others(overlay, uid) == path
            except OSError as err:  # such as a home on NFS, which root may not read
                return f"{printable(os.fsdecode(overlay))} may be an overlay on it: {err.strerror}"
            if is_needed:
                return f"{printable(os.fsdecode(overlay))} is an overlay on it, of user {uid}"
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            lock(fd, "it", writes=True)
        except ImageError:
            return "it is in use"
        finally:
            os.close(fd)
        return ""


def remove_partial(path: str) -> bool:
    """Remove a partial image, unless it is being pulled; returns whether it was removed.

    Raises:
        OSError: it cannot be removed.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        if not _locked(fd) or not _is_at(fd, path):
            return False
        os.unlink(path)
    finally:
        os.close(fd)
    return True


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


# Overlays


def note_overlay(base: str, overlay: str) -> None:
    """Remember that a disk was made on an image of a store, if `base` is one."""
    directory, digest = os.path.split(base)
    if directory not in {_own(), _SYSTEM} or not _DIGEST.fullmatch(digest):
        return
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    path = os.fsencode(os.path.realpath(overlay))
    try:
        fd = os.open(os.path.join(directory, "overlays"), flags, 0o644)
    except PermissionError:  # the system's store, and not root
        flags |= os.O_EXCL
        note = os.path.join(directory, _OTHERS, os.urandom(16).hex())
        with suppress(FileNotFoundError):  # nothing was pulled since there is that folder
            fd = os.open(note, flags, 0o600)
            _write_and_close(fd, path)
        return
    _write_and_close(fd, path + b"\0")


def _write_and_close(fd: int, data: bytes) -> None:
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _overlays_of_others(directory: str) -> Iterator[tuple[bytes, int]]:
    """Yield what other users have noted: a path of anything, and whose note it is."""
    folder = os.path.join(directory, _OTHERS)
    try:
        names = os.listdir(folder)[:_OTHERS_MAX]
    except FileNotFoundError:
        return
    for name in names:
        note = os.path.join(folder, name)
        try:
            fd = os.open(note, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # a link, or a socket
            continue
        try:
            status = os.fstat(fd)
            path = os.read(fd, _PATH_MAX) if stat.S_ISREG(status.st_mode) else b""
        finally:
            os.close(fd)
        if not path.startswith(b"/") or b"\0" in path:
            continue
        if _is_gone(path):
            os.unlink(note)
        else:
            yield path, status.st_uid


def _is_gone(path: bytes) -> bool:
    try:
        os.lstat(path)
    except OSError as err:
        return err.errno in _GONE
    return False


def _base_of_others(path: bytes, uid: int) -> str:
    """Return the base that a disk of a user's names, as `_base_of` does; nothing else is opened.

    Raises:
        OSError: it cannot be looked at.
    """
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != uid:
            return ""
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
        return _base_of(f"/proc/self/fd/{fd}".encode())
    finally:
        os.close(fd)


def _overlays(directory: str) -> list[bytes]:
    try:
        with open(os.path.join(directory, "overlays"), "rb") as file:
            return [path for path in file.read(_OVERLAYS_MAX).split(b"\0") if path]
    except FileNotFoundError:
        return []


def _base_of(path: bytes) -> str:
    """Return the base that a disk names; empty if it is no overlay, or gone."""
    from vmm_kvm.block.file import HostFile  # noqa: PLC0415 - only to remove one
    from vmm_kvm.block.qcow2.header import read_header  # noqa: PLC0415 - the same

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return ""
    try:
        backing = read_header(HostFile(fd, "overlay", is_read_only=True)).backing
    except (ImageError, OSError):
        return ""
    finally:
        os.close(fd)
    return backing.path if backing else ""
