"""`vmctl image pull`, `list`, `rm` and `prune`: images of distributions, kept by their digests.

An image counts once its digest is the one that its distribution's list has, which comes by https,
that of a registry's manifest, or the one of the command line. What a broken connection leaves is
gone on with at the next pull.
"""

import errno
import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from vmctl.client import CommandError
from vmctl.images.digests import DIGITS, Digest, parse_digest
from vmctl.images.sources import LISTS, OCI, Source, check_name, file_in, source_of
from vmctl.images.store import PREFIX, ImageStore, Stored, remove_partial, snapshots_directory
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
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Order(NamedTuple):
    """What is pulled."""

    name: str
    url: str
    wanted: Digest
    limits: "Limits"
    headers: Mapping[str, str] = MappingProxyType({})
    """What the server wants to hear."""
    archive_max: int = 0
    """Bytes in the archive that it may be, as a layer of a container's image; 0 if it is none."""


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
    if words[0].startswith(OCI) and (digest is not None or sums is not None):
        return fail(f"{words[0]}: its digest stands behind it: @sha256:...")
    try:
        source = source_of(*words)
        limits = Limits(
            _PATIENCE_S if timeout is None else seconds_of(timeout),
            _SIZE_MAX if limit is None else _size(limit),
        )
        said = parse_digest(digest) if digest is not None else None
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


def _pull(source: Source, said: Digest | None, limits: "Limits") -> str:
    order = _order(source, said, limits)
    wanted = str(order.wanted)
    store = ImageStore()
    with store.partial(wanted, lambda: warn(f"{source.name}: another pull is on")) as fd:
        if fd is None:
            digest = store.held(wanted) or wanted
            store.name(source.name, digest)
            how = "is there already"
        else:
            digest = _Pull(store, order, fd).run()
            how = "pulled"
    path = store.path(digest)
    warn(f"{source.name}: {how}, {fmt_scaled(os.stat(path).st_size)}: {PREFIX}{source.name}")
    return path


def _order(source: Source, said: Digest | None, limits: "Limits") -> _Order:
    """Find out what is to be pulled, and its digest.

    Raises:
        CommandError: that is not known.
    """
    from vmctl.images.download import check_url  # noqa: PLC0415 - see above

    if source.url.startswith(OCI):
        from vmctl.images.oci import find_disk  # noqa: PLC0415 - only for such
        from vmctl.images.reference import parse_reference  # noqa: PLC0415 - the same

        blob = find_disk(parse_reference(source.url), limits)
        bounds = limits._replace(size=blob.size)
        return _Order(source.name, blob.url, blob.digest, bounds, blob.headers, limits.size)
    url = check_url(source.url, allows_http=said is not None or bool(source.sums))
    return _Order(source.name, url, said or _published(source, url, limits), limits)


def _published(source: Source, url: str, limits: "Limits") -> Digest:
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


def _in_list(text: bytes, name: str) -> Digest | None:
    """Return the digest of a file in the output of sha512sum or sha256sum."""
    by_size = {size: algorithm for algorithm, size in DIGITS.items()}
    for line in text.splitlines():
        digits, _, file = line.partition(b" ")
        file = file.lstrip(b" *").removeprefix(b"./").rstrip()
        if file == os.fsencode(name) and len(digits) in by_size:
            with suppress(CommandError, UnicodeDecodeError):
                return parse_digest(f"{by_size[len(digits)]}:{digits.decode()}")
    return None


class _Pull:
    """One image on its way into the store."""

    def __init__(self, store: ImageStore, order: _Order, fd: int) -> None:
        """Go on with the file at `fd`, which stays the caller's."""
        self._store = store
        self._order = order
        self._fd = fd
        self._hash = hashlib.new(order.wanted.algorithm)
        self._advance: Callable[[int], None] = lambda _: None
        self._stack = ExitStack()

    def run(self) -> str:
        """Get it, check it, and put it into the store; returns the digest of the image.

        Raises:
            CommandError: it does not come, or is another one.
        """
        from vmctl.images.download import Sink, download  # noqa: PLC0415 - see above

        keeps = True
        try:
            start = self._read_back()
            sink = Sink(self._fd, self._restart, self._take, self._begin)
            with self._stack:
                download(self._order.url, self._order.limits, start, sink, self._order.headers)
            keeps = False
            digest = self._publish()
            keeps = True
        except OSError as err:
            if err.errno in _FULL:
                keeps = False  # a full disk is no place for it
            raise CommandError(f"{self._store.directory}: {err.strerror or err}") from err
        finally:
            if not keeps or not os.fstat(self._fd).st_size:
                self._store.drop(str(self._order.wanted))
        return digest

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
        self._hash = hashlib.new(self._order.wanted.algorithm)

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

    def _publish(self) -> str:
        """Put it into its place if it is the wanted one; returns the digest of the image."""
        url, wanted = self._order.url, self._order.wanted
        if not os.fstat(self._fd).st_size:
            raise CommandError(f"{url}: an empty file")
        if self._hash.hexdigest() != wanted.hexadecimal:
            raise CommandError(f"{url}: wrong {wanted.algorithm} digest: removed")
        if self._order.archive_max:
            from vmctl.images.layer import is_archive  # noqa: PLC0415 - only for such

            try:
                if is_archive(os.pread(self._fd, SECTOR_SIZE, 0)):
                    return self._publish_disk()
            except CommandError as err:
                raise CommandError(f"{url}: {err}: removed") from None
        _check_image(self._fd, self._order.name)
        self._store.publish(self._fd, str(wanted), self._order.name)
        return str(wanted)

    def _publish_disk(self) -> str:
        """Put the disk in the layer into its place; returns its digest."""
        from vmctl.images.layer import unpack, write_sparse  # noqa: PLC0415 - only for such
        from vmctl.screen.progress import progress  # noqa: PLC0415 - see `_begin`

        layer = str(self._order.wanted)
        disk, size = hashlib.sha256(), 0
        with self._store.unpacked(layer) as fd, self._stack:

            def begin(size: int) -> None:
                self._advance = self._stack.enter_context(progress("unpack", size))

            for piece in unpack(self._fd, self._order.archive_max, begin):
                write_sparse(fd, piece)
                disk.update(piece)
                size += len(piece)
                self._advance(len(piece))
            if not size:
                raise CommandError("an empty disk")
            os.ftruncate(fd, size)
            _check_image(fd, self._order.name)
            digest = f"sha256-{disk.hexdigest()}"
            self._store.publish_layer(fd, layer, digest, self._order.name)
        self._store.drop(layer)
        return digest


def _check_image(fd: int, name: str) -> None:
    """Check that it can be an image, and one that names no file of this host.

    Raises:
        ImageError: it is none.
    """
    first = os.pread(fd, SECTOR_SIZE, 0)
    last = os.pread(fd, SECTOR_SIZE, max(0, os.fstat(fd).st_size - SECTOR_SIZE))
    if probe(first) is Format.QCOW2:
        if read_header(HostFile(fd, name, is_read_only=True)).backing:
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
    """Remove images without a name, partial ones, and a fleet's snapshots; returns their bytes.

    Raises:
        OSError: one cannot be removed.
    """
    freed = _prune_one(ImageStore())
    directory = snapshots_directory()
    return freed + _prune_one(ImageStore(directory)) if os.path.exists(directory) else freed


def _prune_one(store: ImageStore) -> int:
    freed = 0
    for path in store.partials():
        size = os.stat(path).st_size
        if remove_partial(path):
            freed += size
    store.forget_layers()
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
