"""A driver of a shared directory: FUSE requests by PCI and virtqueues, through a real process."""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack

from tests.fuse_client import FuseCalls
from tests.virtio_driver import DriverQueue
from tests.virtio_pci_driver import PciDriver
from vmm_kvm.bits import MIB
from vmm_kvm.fs import abi
from vmm_kvm.memory import GuestMemory
from vmm_kvm.virtio.abi import VIRTIO_F_VERSION_1
from vmm_kvm.virtio.vhost_user.fs import RemoteFsSpec, make_remote_fs

RAM_SIZE = 8 * MIB
_REQUEST, _DATA, _ANSWER, _ROOM = MIB, 2 * MIB, 4 * MIB, 6 * MIB
SILENT = {abi.FUSE_FORGET, abi.FUSE_BATCH_FORGET, abi.FUSE_INTERRUPT}
_SPLIT = 10
"""The offset at which a driver may split a header."""


class Guest(FuseCalls):
    """A driver of a file system, by PCI and virtqueues."""

    def __init__(self, spec: RemoteFsSpec, stack: ExitStack) -> None:
        """Have a process serve it; `start` comes when all are there."""
        super().__init__(self._ask)
        memory = GuestMemory(((0, RAM_SIZE),), "test", is_private=False)
        stack.callback(memory.close)
        self.pci = PciDriver(make_remote_fs(spec, memory))
        stack.callback(self.pci.device.close)
        self._ram = memory.view(0, RAM_SIZE)
        self.queues = {index: DriverQueue(self._ram, 64, 0x4000 * (index + 1)) for index in (0, 1)}

    def start(self) -> None:
        """Reset the device, and start it anew."""
        self.pci.status = 0
        for queue in self.queues.values():
            queue.seen = queue.added = 0
            self._ram[queue.ring.available : queue.ring.used + 1024] = bytes(
                queue.ring.used + 1024 - queue.ring.available
            )
        self.pci.start(self.queues, features=1 << VIRTIO_F_VERSION_1, msix=False)

    def tag(self) -> bytes:
        """Return the tag in the configuration space."""
        return bytes(self.pci.device_config(at, 1) for at in range(36)).rstrip(b"\0")

    def _ask(self, request: bytes, data: bytes, room: int) -> bytes:
        opcode = int.from_bytes(request[4:8], "little")
        is_silent = opcode in SILENT
        ram, queue = self._ram, self.queues[0 if is_silent else 1]
        ram[_REQUEST : _REQUEST + len(request)] = request
        ram[_DATA : _DATA + len(data)] = data
        buffers = [(_REQUEST, _SPLIT, False), (_REQUEST + _SPLIT, len(request) - _SPLIT, False)]
        if data:
            buffers.append((_DATA, len(data), False))
        if not is_silent:
            buffers += [(_ANSWER, 16, True), (_ROOM, max(room, 16), True)]
        queue.add(*buffers)
        self.pci.notify(0 if is_silent else 1)
        while not (used := queue.used()):
            assert self.pci.pin_rose()
            assert not self.pci.isr() & 2, "the device has failed"
        ((_, written),) = used
        if is_silent:
            assert written == 0
            return b""
        size, error, unique = struct.unpack_from("=IiQ", ram, _ANSWER)
        assert (size, unique) == (written, struct.unpack_from("=Q", request, 8)[0])
        if error:
            raise OSError(-error, os.strerror(-error))
        return bytes(ram[_ROOM : _ROOM + size - 16])
