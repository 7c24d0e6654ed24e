"""Absolute paths that mean what the kernel takes the relative ones for.

`os.path.abspath` shortens `link/..` and `file/`, which are other files, or none, for the kernel.
"""

import os
from errno import ENOENT


def absolute(path: str) -> str:
    """Return a path that means the same in each directory; nothing need be there.

    Raises:
        FileNotFoundError: the path is empty, or relative to a directory that has been removed.
    """
    if path.startswith("/"):
        return path
    if not path:
        raise FileNotFoundError(ENOENT, os.strerror(ENOENT), path)
    return f"{working_directory(path).rstrip('/')}/{path}"


def working_directory(path: str | None = None) -> str:
    """Return the working directory, in which `path` begins.

    Raises:
        FileNotFoundError: it has been removed.
    """
    try:
        return os.getcwd()  # noqa: PTH109 - commands start without pathlib
    except FileNotFoundError:
        why = "the working directory has been removed"
        raise FileNotFoundError(ENOENT, why, path) from None
