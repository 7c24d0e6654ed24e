"""virtio-fs: requests of the FUSE protocol from a driver, and answers to it.

The backend is for a process of its own: a request waits for the host's file system, and those
behind it wait too.

Source: virtio 1.3 §5.11
"""

import errno
import struct

from vmm_kvm.errors import VirtqueueError
from vmm_kvm.fs.abi import FUSE_WRITE, IN_HEADER, OUT_HEADER, WRITE_IN
from vmm_kvm.fs.server import REQUEST_MAX, FuseServer
from vmm_kvm.scatter import total
from vmm_kvm.state import Part
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.buffers import gather, scatter, split
from vmm_kvm.virtio.chain import Chain
from vmm_kvm.virtio.fs_config import REQUEST_QUEUES, config_of
from vmm_kvm.virtio.queue import Virtqueue

QUEUE_SIZE = 256

_WRITE_HEAD = IN_HEADER.size + WRITE_IN.size
_CALL = slice(4, 8)


class VirtioFs:
    """A file system of the host's; a `virtio.device.Backend` that owns its server."""

    def __init__(self, server: FuseServer, tag: bytes) -> None:
        """Serve requests by `server`; `tag` is 1 to 36 bytes, none of them zero.

        The first queue is for requests that need no answer, the second one for all others.
        """
        self.device_id = abi.VIRTIO_ID_FS
        self.features = 0
        self.queue_sizes: tuple[int, ...] = (QUEUE_SIZE,) * (1 + REQUEST_QUEUES)
        self._server = server
        self._tag = tag

    def config(self) -> bytes:
        """Return the configuration space: the tag, and the number of request queues."""
        return config_of(self._tag)

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore it."""

    def start(self, features: int) -> None:
        """Begin; no feature matters."""

    def process(self, index: int, queue: Virtqueue) -> None:  # noqa: ARG002 - both are alike
        """Serve the requests in a queue."""
        while chain := queue.pop():
            queue.push(chain, self._serve(chain))

    def reset(self) -> None:
        """Do nothing: no request is ever kept, and a session ends where the next one begins."""

    def close(self) -> None:
        """Close what the guest has open."""
        self._server.close()

    def parts(self, _name: str) -> list[Part]:
        """Return none: what a guest has open is the host's, and no other process could have it."""
        return []

    def _serve(self, chain: Chain) -> int:
        """Serve a request; returns how many bytes were written."""
        head = gather(chain.readable, _WRITE_HEAD)
        if len(head) < IN_HEADER.size:
            raise VirtqueueError(f"a FUSE request of {len(head)} bytes")
        if int.from_bytes(head[_CALL], "little") == FUSE_WRITE:
            request, (_, data) = head, split(chain.readable, _WRITE_HEAD)
        else:
            request, data = gather(chain.readable, REQUEST_MAX), []
        size = total(chain.writable)
        _, room = split(chain.writable, OUT_HEADER.size)
        try:
            answer = self._server.answer(request, data, room)
            error = 0
        except OSError as err:
            answer, error = b"", err.errno or errno.EIO
        if answer is None:
            return 0
        if size < OUT_HEADER.size:
            return 0
        if isinstance(answer, bytes):
            if len(answer) > size - OUT_HEADER.size:
                answer, error = b"", errno.EIO
            scatter(room, answer)
        count = OUT_HEADER.size + (answer if isinstance(answer, int) else len(answer))
        (unique,) = struct.unpack_from("=Q", request, 8)
        scatter(chain.writable, OUT_HEADER.pack(count, -error, unique))
        return count
