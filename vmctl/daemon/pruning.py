"""`vmctl image prune`: removes images and seeds that nothing needs any more.

A seed of `start --cloud-init`, `--ssh-key` or `--agent` is a file that outlives its VM, because a
snapshot of that names it. It goes when no VM has it open, no VM of the daemon has it as a disk, and
no snapshot in the daemon's store names it.
"""

from collections.abc import Sequence

from vmctl.client import Client, CommandError
from vmctl.images.pull import prune_store
from vmctl.images.seed import prune_seeds, seeds
from vmctl.messages import fail, warn
from vmd.config.sizes import fmt_scaled
from vmm_kvm.errors import VmmError


def prune(words: Sequence[str]) -> int:
    """Remove what nothing needs; returns the exit status."""
    del words
    try:
        freed = prune_store()
        if seeds():
            freed += _prune_seeds()
    except OSError as err:
        return fail(f"{err.filename}: {err.strerror}" if err.filename else str(err.strerror))
    print(f"{fmt_scaled(freed)} freed")
    return 0


def _prune_seeds() -> int:
    try:
        needed = _needed()
    except (CommandError, VmmError) as err:
        warn(f"seeds of cloud-init stay: vmd does not tell which are needed: {err}")
        return 0
    return prune_seeds(needed)


def _needed() -> set[str]:
    """Return the names of files that are disks of VMs or snapshots; names of seeds are unique."""
    from vmctl.daemon.snapshots import disks_of  # noqa: PLC0415 - only if there are seeds

    with Client() as client:
        paths = [disk["path"] for vm in client.vms(devices=True) for disk in vm["disks"]]
        found = client.ask("snapshots", "snapshot-list")["snapshots"]
    for one in found:
        paths += disks_of(one["name"])
    return {path.rpartition("/")[2] for path in paths}
