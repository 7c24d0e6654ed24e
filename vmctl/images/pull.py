"""`vmctl image pull`, `list`, `rm` and `prune`: images of distributions, kept by their digests.

An image counts once its digest is the one that its distribution's list has, which comes by https,
or the one of the command line. What a broken connection leaves is gone on with at the next pull.
"""

import errno
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple

from vmctl.client import CommandError
from vmctl.images.sources import LISTS, Source, check_name, file_in, source_of
from vmctl.images.store import PREFIX, ImageStore, Stored, remove_partial
from vmctl.messages import fail, warn
from vmctl.signals import cleaning_up
from vmctl.values import seconds_of
from vmd.config.sizes import SizeError, fmt_scaled, scan_scaled
from vmm_kvm.block.file import HostFile
from vmm_kvm.block.headers import SECTOR_SIZE, foreign
from vmm_kvm.block.image import Format
from vmm_kvm.block.qcow2.header import read_header
from vmm_kvm.errors import ImageError, VmmError
from vmm_kvm.images.opening import probe
from vmm_kvm.text import printable

if TYPE_CHECKING:  # loaded to pull
    from vmctl.images.download import Limits

_LIST_MAX = 4 << 20
_SIZE_MAX = 64 << 30
_PATIENCE_S = 60.0
_PIECE = 1 << 20
_DIGITS = {"sha256": 64, "sha512": 128}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Digest(NamedTuple):
    """The requirements of an image."""

    algorithm: str
    hexadecimal: str

    def __str__(self) -> str:
        return f"{self.algorithm}-{self.hexadecimal}"


def pull(
    words: Sequence[str],
    *,
    digest: str | None = None,
    sums: str | None = None,
    limit: str | None = None,
    timeout: str | None = None,
) -> int:
    """Get an image, and print its path; returns the exit status."""
    from vmctl.images.download import Limits  # noqa: PLC0415 - the others ask no server

    if digest is not None and sums is not None:
        return fail("--digest and --sums: use one")
    try:
        source = source_of(*words)
        limits = Limits(
            _PATIENCE_S if timeout is None else seconds_of(timeout),
            _SIZE_MAX if limit is None else _size(limit),
        )
        said = _digest(digest) if digest is not None else None
        with cleaning_up():
            path = _pull(source._replace(sums=sums or source.sums), said, limits)
    except (CommandError, VmmError) as err:
        return fail(err)
    except OSError as err:
        return fail(_told(err))
    print(printable(path))
    return 0


def _size(text: str) -> int:
    try:
        size = scan_scaled(text)
    except SizeError as err:
        raise CommandError(f"invalid limit: {text}: {err}") from None
    if size <= 0:
        raise CommandError(f"invalid limit: {text}")
    return size


def _told(err: OSError) -> str:
    name = os.fsdecode(err.filename) if isinstance(err.filename, str | bytes) else ""
    text = err.strerror or str(err)
    return f"{name}: {text}" if name else text


def _digest(text: str) -> _Digest:
    algorithm, _, digits = text.partition(":")
    digits = digits.lower()
    is_hexadecimal = digits.isascii() and not digits.strip("0123456789abcdef")
    if len(digits) != _DIGITS.get(algorithm) or not is_hexadecimal:
        raise CommandError(f"invalid digest: {text}: sha256: or sha512: and its digits")
    return _Digest(algorithm, digits)


def _pull(source: Source, said: "_Digest | None", limits: "Limits") -> str:
    from vmctl.images.download import check_url  # noqa: PLC0415 - see above

    url = check_url(source.url, allows_http=said is not None or bool(source.sums))
    wanted = said or _published(source, url, limits)
    store = ImageStore()
    with store.partial(str(wanted), lambda: warn(f"{source.name}: another pull is on")) as fd:
        if fd is None:
            store.name(source.name, str(wanted))
            how = "is there already"
        else:
            _Pull(store, source._replace(url=url), wanted, limits, fd).run()
            how = "pulled"
    path = store.path(str(wanted))
    warn(f"{source.name}: {how}, {fmt_scaled(os.stat(path).st_size)}: {PREFIX}{source.name}")
    return path


def _published(source: Source, url: str, limits: "Limits") -> _Digest:
    """Return the digest that the distribution's list has.

    Raises:
        CommandError: there is no list, or the image is not in it.
    """
    from urllib.parse import urljoin  # noqa: PLC0415 - see above

    from vmctl.images.download import MissingError, check_url, fetch  # noqa: PLC0415 - see above

    bounds = limits._replace(size=_LIST_MAX)
    name = file_in(url)
    for path in (source.sums,) if source.sums else LISTS:
        at = check_url(urljoin(url, path), allows_http=False)
        try:
            text = fetch(at, bounds)
        except MissingError:
            if source.sums:
                raise
            continue
        found = _in_list(text, name)
        if found is None:
            raise CommandError(f"{at}: has no digest of {name}")
        return found
    raise CommandError(
        f"{url}: there is no {' or '.join(LISTS)} beside it: say --digest, or --sums address"
    )


def _in_list(text: bytes, name: str) -> _Digest | None:
    """Return the digest of a file in the output of sha512sum or sha256sum."""
    by_size = {size: algorithm for algorithm, size in _DIGITS.items()}
    for line in text.splitlines():
        digits, _, file = line.partition(b" ")
        file = file.lstrip(b" *").removeprefix(b"./").rstrip()
        if file == os.fsencode(name) and len(digits) in by_size:
            with suppress(CommandError, UnicodeDecodeError):
                return _digest(f"{by_size[len(digits)]}:{digits.decode()}")
    return None


class _Pull:
    """One image on its way into the store."""

    def __init__(
        self, store: ImageStore, source: Source, wanted: _Digest, limits: "Limits", fd: int
    ) -> None:
        """Go on with the file at `fd`, which stays the caller's."""
        self._store = store
        self._source = source
        self._url = source.url
        self._wanted = wanted
        self._limits = limits
        self._fd = fd
        self._hash = hashlib.new(wanted.algorithm)
        self._advance: Callable[[int], None] = lambda _: None
        self._stack = ExitStack()

    def run(self) -> None:
        """Get it, check it, and put it into the store.

        Raises:
            CommandError: it does not come, or is another one.
        """
        from vmctl.images.download import Sink, download  # noqa: PLC0415 - see above

        keeps = True
        try:
            start = self._read_back()
            sink = Sink(self._fd, self._restart, self._take, self._begin)
            with self._stack:
                download(self._url, self._limits, start, sink)
            keeps = False
            self._check()
            self._store.publish(self._fd, str(self._wanted), self._source.name)
            keeps = True
        except OSError as err:
            if err.errno in _FULL:
                keeps = False  # a full disk is no place for it
            raise CommandError(f"{self._store.directory}: {err.strerror or err}") from err
        finally:
            if not keeps or not os.fstat(self._fd).st_size:
                self._store.drop(str(self._wanted))

    def _read_back(self) -> int:
        """Take what an earlier pull has left; returns its size."""
        os.lseek(self._fd, 0, os.SEEK_SET)
        size = 0
        while data := os.read(self._fd, _PIECE):
            self._hash.update(data)
            size += len(data)
        return size

    def _restart(self) -> None:
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._hash = hashlib.new(self._wanted.algorithm)

    def _begin(self, start: int, size: int | None) -> None:
        from vmctl.images.download import free_space  # noqa: PLC0415 - see above
        from vmctl.screen.progress import progress  # noqa: PLC0415 - the others take no time

        room = free_space(self._store.directory)
        if size is not None and size - start > room:
            raise CommandError(
                f"{self._store.directory}: {fmt_scaled(size - start)} do not fit:"
                f" {fmt_scaled(room)} are free"
            )
        self._advance = self._stack.enter_context(progress("pull", size, start))

    def _take(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self._hash.update(data)
        self._advance(len(data))

    def _check(self) -> None:
        """Check that it is the image that was wanted, and one that names no file of this host."""
        name = self._source.name
        if not os.fstat(self._fd).st_size:
            raise CommandError(f"{self._url}: an empty file")
        if self._hash.hexdigest() != self._wanted.hexadecimal:
            raise CommandError(f"{self._url}: wrong {self._wanted.algorithm} digest: removed")
        first = os.pread(self._fd, SECTOR_SIZE, 0)
        last = os.pread(self._fd, SECTOR_SIZE, max(0, os.fstat(self._fd).st_size - SECTOR_SIZE))
        if probe(first) is Format.QCOW2:
            if read_header(HostFile(self._fd, name, is_read_only=True)).backing:
                raise ImageError(f"{name}: it names a base image, a file of this host: removed")
        elif problem := foreign(name, first, last):
            raise ImageError(problem.replace(f", or say raw:{name}", ""))


def show_list(words: Sequence[str], *, as_json: bool = False) -> int:
    """Print the images of the store; returns the exit status."""
    del words
    try:
        images = ImageStore().images()
    except OSError as err:
        return fail(_told(err))
    if as_json:
        import json  # noqa: PLC0415 - only for this

        print(json.dumps([one._asdict() for one in images], indent=2))
        return 0
    rows = [
        (fmt_scaled(one.size), _day(one.pulled), one.digest[:19], ", ".join(one.names) or "-")
        for one in images
    ]
    header = ("SIZE", "PULLED", "DIGEST", "NAME")
    if sys.stdout.isatty():
        from vmctl.screen.table import show_table  # noqa: PLC0415 - only people see it

        show_table(header, rows)
        return 0
    for row in (header, *rows):
        print(f"{row[0]:>6} {row[1]:10} {row[2]:19} {printable(row[3])}")
    return 0


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def remove(words: Sequence[str]) -> int:
    """Remove images by their names; returns the exit status."""
    store = ImageStore()
    status = 0
    for word in words:
        try:
            _remove(store, check_name(word.removeprefix(PREFIX)))
        except (CommandError, VmmError) as err:
            status = fail(err)
        except OSError as err:
            status = fail(_told(err))
    return status


def _remove(store: ImageStore, name: str) -> None:
    """Remove a name, and its image if that has no other one.

    Raises:
        CommandError: there is no such name, or the image is needed.
        OSError: it cannot be removed.
    """
    digest = store.digest(name)
    if not digest:
        raise CommandError(f"{name}: there is no such image")
    with store.locked():
        images = {one.digest: one for one in store.images()}
        if digest in images and len(images[digest].names) == 1:
            if why := store.user(digest):
                raise CommandError(f"{name}: stays: {why}")
            store.remove(digest)
        store.unname(name)


def prune_store() -> int:
    """Remove images without a name, and partial ones; returns their bytes.

    Raises:
        OSError: one cannot be removed.
    """
    store = ImageStore()
    freed = 0
    for path in store.partials():
        size = os.stat(path).st_size
        if remove_partial(path):
            freed += size
    with store.locked():
        for image in store.images():
            freed += _prune(store, image)
    return freed


def _prune(store: ImageStore, image: Stored) -> int:
    if image.names:
        return 0
    if why := store.user(image.digest):
        warn(f"{image.digest[:19]}: stays: {why}")
        return 0
    store.remove(image.digest)
    return image.size
