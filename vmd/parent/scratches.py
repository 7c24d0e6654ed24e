"""Files without a name for the throw-away disks of VMs; they survive reboots."""

import os
from contextlib import nullcontext

from vmd.config.model import Owner
from vmd.confine.sandbox import owning
from vmd.parent.errors import ResourceError
from vmd.wire.messages import ErrorCode
from vmm_kvm.scratch import open_scratch, scratch_directory


class Scratches:
    """Owns the guests' writes, by the VMs' ids and the indices of their disks."""

    def __init__(self) -> None:
        """Begin without any."""
        self._files: dict[int, dict[int, int]] = {}

    def open(self, vm_id: int, place: int, owner: Owner) -> int:
        """Return the descriptor of a disk's file: the one from before a reboot, or a new one.

        It stays this object's. A daemon of root's gives a new file to the VM's owner, against
        whose quota it counts then.

        Raises:
            ResourceError: it cannot be made.
        """
        files = self._files.setdefault(vm_id, {})
        if place in files:
            return files[place]
        try:
            is_root = os.geteuid() == 0
            with owning(owner.uid or 0, owner.gid or 0) if is_root else nullcontext():
                scratch = files[place] = open_scratch()
        except OSError as err:
            text = f"no file for a throw-away disk: {scratch_directory()}: {err.strerror}"
            raise ResourceError(ErrorCode.EIO, text) from err
        return scratch

    def close(self, vm_id: int) -> None:
        """Discard the writes of a VM's guest, if any."""
        for scratch in self._files.pop(vm_id, {}).values():
            os.close(scratch)

    def close_all(self) -> None:
        """Throw away all."""
        for vm_id in tuple(self._files):
            self.close(vm_id)
