"""`vmctl create`: new disk images, empty, as overlays, or as copies; without a daemon.

Exit status: 0 on success, 1 on any failure. All messages but those of a copy's progress are
OpenBSD's.

Source: section 3.5 of OpenBSD's behaviour.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from vmctl.images.disk_files import DiskFile, parse_disk, set_up_logging
from vmctl.images.disk_files import reason as why
from vmctl.images.store import note_overlay, stored_path
from vmctl.line.verbs import VERBS, usage
from vmctl.messages import bytes_hint, fail, warn
from vmctl.signals import cleaning_up
from vmd.config.sizes import SizeError, fmt_scaled, scan_scaled
from vmm_kvm.block.image import Format, StoredImage
from vmm_kvm.errors import ImageError, VmmError
from vmm_kvm.images.create import (
    SourceError,
    copy,
    create_image,
    create_qcow2,
    new_image,
    rounded_up,
)
from vmm_kvm.images.opening import CHAIN_MAX, image_chain, open_image
from vmm_kvm.text import printable

_MIB = 1 << 20
_LONG_COPY = 256 * _MIB  # after this time users want to see progress


class RefusedError(Exception):
    """A request is impossible; `str()` has the lines for the user."""


def create(
    words: Sequence[str],
    *,
    size: str | None = None,
    base: str | None = None,
    source: str | None = None,
) -> int:
    """Create an image of `size`, over `base`, or as a copy of `source`; return the exit status."""
    set_up_logging()
    (disk,) = words
    try:
        with cleaning_up():
            _create(parse_disk(disk), disk, size, base, source)
    except (RefusedError, VmmError) as err:
        return fail(str(err))
    return 0


def _create(
    target: DiskFile, named: str, size: str | None, base: str | None, source: str | None
) -> None:
    number = None if size is None else disk_size(size)
    if base is not None and source is not None:
        raise RefusedError("conflicting -b and -i arguments")
    if base is not None and target.disk_format is not Format.QCOW2:
        raise RefusedError("base images require qcow2 disk format")
    if source is not None:
        _convert(parse_disk(source), target, number)
    else:
        base_format = Format.QCOW2
        if base is not None:
            base = stored_path(base)
            named_base = _parse_base(base, target.path)
            number, base_format = _over_base(named_base, target.path, number)
            base = named_base.path
        if number is None:
            print(f"could not create {printable(named)}: missing size argument", file=sys.stderr)
            print(usage(VERBS["create"]), file=sys.stderr)
            raise RefusedError("")
        try:
            if base is None:
                create_image(target.path, target.disk_format, number)
            else:
                create_qcow2(target.path, number, base, base_format)
                note_overlay(base, target.path)
        except (OSError, ValueError) as err:
            raise RefusedError(f"create imagefile operation failed: {why(err)}") from err
    warn(f"{target.disk_format} imagefile created")


def disk_size(text: str) -> int:
    """Read the size of a disk as it is typed; it is rounded down to whole megabytes.

    Raises:
        RefusedError: it is none, or too small.

    Source: section 3.5, size rules.
    """
    try:
        size = scan_scaled(text)
    except SizeError as err:
        raise RefusedError(f"invalid disk size: {text}: {err}") from err
    if size < _MIB:
        raise RefusedError(f"disk size must be at least 1MB{bytes_hint(text, 'G')}")
    if size % _MIB:
        size -= size % _MIB
        warn(f"disk size rounded to {fmt_scaled(size)}")
    return size


def _parse_base(argument: str, path: str) -> DiskFile:
    """Tell path and format of a base; a relative path begins at the directory of `path`."""
    for disk_format in Format:
        prefix = f"{disk_format}:"
        if argument.startswith(prefix):
            return DiskFile(argument.removeprefix(prefix), disk_format)
    directory = os.path.dirname(path)
    found = parse_disk(os.path.join(directory, argument))
    return DiskFile(argument, found.disk_format)


def _over_base(named: DiskFile, path: str, size: int | None) -> tuple[int, Format]:
    """Return the size of a new image over a base that is not being written, and its format.

    The base is `named` as seen from the directory of `path`. Unlike OpenBSD's, an overlay may be
    larger than its base, and the base may be raw.
    """
    base = os.path.join(os.path.dirname(path), named.path)
    try:
        chain = image_chain(base, named.disk_format)
    except ImageError as err:
        raise RefusedError(f"failure to read base image header: {err}") from err
    if len(chain) == CHAIN_MAX:
        raise RefusedError(f"{base}: it has {CHAIN_MAX - 1} base images already, the most")
    try:
        image = open_image(base, chain[0].disk_format, True)
    except ImageError as err:
        raise RefusedError(f"cannot use base image: {err}") from err
    least = image.size
    image.close()
    if not least:
        raise RefusedError("missing disk size")
    if size is not None and size < least:
        raise RefusedError("size cannot be smaller than base disk size")
    return least if size is None else size, chain[0].disk_format or Format.RAW


def _convert(source: DiskFile, target: DiskFile, size: int | None) -> None:
    """Copy a disk, with what its bases hold, to a new image of whole megabytes."""
    try:
        image = open_image(source.path, source.disk_format, True)
    except ImageError as err:
        raise RefusedError(f"{err}\nfailed to open source image file") from err
    try:
        if size is None:
            size = image.size
        if size < image.size:
            raise RefusedError("size cannot be smaller than input disk size")
        rounded = rounded_up(size)
        with ExitStack() as stack:
            with _creating(target):
                new = stack.enter_context(new_image(target.path, target.disk_format, rounded))
            try:
                _fill(new.fd, target, image)
            except ImageError as err:
                raise RefusedError(f"{err}\nfailed to open destination image file") from err
            except SourceError as err:
                reason = f"{source.path}: {why(err)}"
                raise RefusedError(f"{reason}\nfailed to read from source") from err
            except OSError as err:
                reason = f"{target.path}: {why(err)}"
                raise RefusedError(f"{reason}\nfailed to write to destination") from err
            with _creating(target):
                new.publish()
    finally:
        image.close()
    if rounded != size:
        warn(f"destination size rounded to {rounded // _MIB} megabytes")


@contextmanager
def _creating(target: DiskFile) -> Iterator[None]:
    """Report errors inside as a destination that cannot be created."""
    try:
        yield
    except (OSError, ValueError) as err:
        reason = f"{target.path}: {why(err)}"
        raise RefusedError(f"{reason}\nfailed to create destination image file") from err


def _fill(fd: int, target: DiskFile, image: StoredImage) -> None:
    """Copy a disk into the new image at `fd`, which stays the caller's."""
    copied = open_image(os.dup(fd), target.disk_format, False, name=target.path)
    try:
        if image.size < _LONG_COPY:
            copy(image, copied, lambda _: None)
            return
        from vmctl.screen.progress import progress  # noqa: PLC0415 - few copies take long

        with progress("copy", image.size) as advance:
            copy(image, copied, advance)
    finally:
        copied.close()
