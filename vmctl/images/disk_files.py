"""Arguments of `vmctl create` and `vmctl image` that name disks."""

import os
from typing import NamedTuple

from vmctl.images.store import stored_path
from vmm_kvm import log
from vmm_kvm.block.headers import SECTOR_SIZE, foreign, foreign_name
from vmm_kvm.block.image import Format
from vmm_kvm.errors import ImageError
from vmm_kvm.images.opening import probe


class DiskFile(NamedTuple):
    """A disk that an argument names."""

    path: str
    disk_format: Format


def parse_disk(argument: str) -> DiskFile:
    """Tell path and format: by prefix, by the file's first bytes, by extension; else it is raw.

    Raises:
        SpecError: it is an image of the store, by `image:`, and there is none of that name.
        ImageError: it is, or would be named like, an image of a format that is not supported, or
            compressed, and its format was not said.

    Source: section 2.5 of OpenBSD's behaviour.
    """
    for disk_format in Format:
        if argument.startswith(f"{disk_format}:"):
            return DiskFile(argument[len(disk_format) + 1 :], disk_format)
    argument = stored_path(argument)
    try:
        descriptor = os.open(argument, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError):
        # It is to be created, or opening it will report the error.
        problem = foreign_name(argument)
    else:
        problem = None
        try:
            first = os.read(descriptor, SECTOR_SIZE)
            if probe(first) is Format.QCOW2:
                return DiskFile(argument, Format.QCOW2)
            end = max(0, os.lseek(descriptor, 0, os.SEEK_END) - SECTOR_SIZE)
            problem = foreign(argument, first, os.pread(descriptor, SECTOR_SIZE, end))
        except OSError:
            pass  # a directory; see above
        finally:
            os.close(descriptor)
    if problem:
        raise ImageError(problem)
    extension = argument.rpartition(".")[2].lower()
    return DiskFile(argument, Format.QCOW2 if extension == Format.QCOW2 else Format.RAW)


def set_up_logging() -> None:
    """Suppress messages of the image code, unless -v shows everything."""
    log.set_up_with(_show_nothing)


def _show_nothing() -> None:
    import logging  # noqa: PLC0415 - most commands log nothing

    logging.basicConfig(level=logging.CRITICAL)


def reason(err: OSError | ValueError) -> str:
    """Return why a file could not be used."""
    return (err.strerror or str(err)) if isinstance(err, OSError) else str(err)
