"""The seed of a VM: a disk from which a guest with cloud-init sets itself up."""

from typing import NamedTuple

SSH_KEYS_MAX = 16
"""Files of public keys of one VM."""


class SeedOption(NamedTuple):
    """A seed, as it was asked for."""

    cloud_init: str = ""
    """The path of user-data, or of a directory with the files of a seed; empty for none."""
    ssh_keys: tuple[str, ...] = ()
    """Paths of files of public keys."""
