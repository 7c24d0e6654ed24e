"""Files without a name, for writes over images that stay as they are."""

import os

DEFAULT_DIRECTORY = "/var/tmp"  # noqa: S108 - the files have no names


def scratch_directory() -> str:
    """Return where such files are: TMPDIR, or else a directory that is on a disk."""
    return os.environ.get("TMPDIR") or DEFAULT_DIRECTORY


def open_scratch() -> int:
    """Make an empty file without a name, open to read and write; returns its descriptor.

    Raises:
        OSError: it cannot be made in `scratch_directory`.
    """
    from tempfile import TemporaryFile  # noqa: PLC0415 - few disks need one

    with TemporaryFile(dir=scratch_directory(), buffering=0) as file:
        return os.dup(file.fileno())
