"""Texts of errors that end `vmctl run`."""

import os

from vmm_kvm.errors import VmmError


def told(err: Exception) -> str:
    """Return an error's text; one of the system without its number, and with its subject."""
    if isinstance(err, VmmError) or not isinstance(err, OSError) or err.strerror is None:
        return str(err)
    return err.strerror if err.filename is None else f"{os.fsdecode(err.filename)}: {err.strerror}"
