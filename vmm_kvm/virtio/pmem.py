"""virtio-pmem: a disk that is memory of the guest. The only requests are flushes.

The guest reads and writes the memory itself, without an exit; the machine has put it where the
configuration space says.

Source: virtio 1.2 §5.19
"""

import struct
from collections.abc import Callable
from typing import Literal, NamedTuple

from vmm_kvm.block.mapped import MappedImage
from vmm_kvm.errors import StateError, VirtqueueError
from vmm_kvm.log import Log
from vmm_kvm.state import U64, Part, PartState
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.buffers import gather, scatter
from vmm_kvm.virtio.queue import Virtqueue

log = Log(__name__)

QUEUE_SIZE = 64

_CONFIG = struct.Struct("<QQ")  # guest-physical address, bytes
_REQUEST = struct.Struct("<I")  # type
_RESPONSE = struct.Struct("<I")  # 0 for success
_OK, _ERROR = 0, 1


class PmemSpec(NamedTuple):
    """A disk of a machine that is memory of the guest; the image stays the caller's."""

    image: MappedImage
    name: str
    """For the log."""
    kind: Literal["pmem"] = "pmem"


class PmemState(PartState):
    """The place of a pmem device's memory; its contents are the image's."""

    gpa: U64
    size: U64
    """Bytes."""
    version: Literal[1] = 1


class VirtioPmem:
    """A pmem device; a `virtio.device.Backend`.

    `flush` makes everything that the guest wrote durable; an OSError of it is the guest's EIO.
    """

    __slots__ = (
        "_config",
        "_flush",
        "_has_failed",
        "_name",
        "device_id",
        "features",
        "queue_sizes",
    )

    def __init__(self, gpa: int, size: int, flush: Callable[[], None], *, name: str) -> None:
        """Describe `size` bytes of memory at `gpa`; `name` is for the log."""
        self.device_id = abi.VIRTIO_ID_PMEM
        self.features = 0
        self.queue_sizes: tuple[int, ...] = (QUEUE_SIZE,)
        self._config = _CONFIG.pack(gpa, size)
        self._flush = flush
        self._has_failed = False
        self._name = name

    def config(self) -> bytes:
        """Return where the memory is."""
        return self._config

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore it."""

    def start(self, features: int) -> None:
        """Begin; no feature matters."""

    def process(self, _index: int, queue: Virtqueue) -> None:
        """Flush once for all requests that are available: each was made before it.

        Raises:
            GuestError: a request has no type, or no room for the answer.
        """
        chains = []
        while chain := queue.pop():
            request = gather(chain.readable, _REQUEST.size)
            if len(request) < _REQUEST.size:
                raise VirtqueueError(f"{self._name}: a request of {len(request)} bytes")
            chains.append((chain, _REQUEST.unpack(request)[0]))
        if not chains:
            return
        flushed = self._try_flush()
        for chain, kind in chains:
            result = flushed if kind == abi.VIRTIO_PMEM_REQ_TYPE_FLUSH else _ERROR
            if scatter(chain.writable, _RESPONSE.pack(result)) < _RESPONSE.size:
                raise VirtqueueError(f"{self._name}: a request without room for its answer")
            queue.push(chain, _RESPONSE.size)

    def reset(self) -> None:
        """Do nothing: no request outlives `process`."""

    def close(self) -> None:
        """Do nothing: the memory is the machine's."""

    def parts(self, name: str) -> list[Part]:
        """Return itself."""
        return [Part(f"{name}/pmem", self)]

    def save(self) -> PmemState:
        """Return where the memory lies."""
        gpa, size = _CONFIG.unpack(self._config)
        return PmemState(gpa=gpa, size=size)

    def restore(self, state: PmemState) -> None:
        """Continue with a device at the same place.

        Raises:
            StateError: it lies elsewhere.
        """
        if state != self.save():
            raise StateError(f"{state.size} bytes at {state.gpa:#x}: lies elsewhere")

    def _try_flush(self) -> int:
        try:
            self._flush()
        except OSError as err:
            if not self._has_failed:
                self._has_failed = True
                log.warning("%s: flush: %s", self._name, err)
            return _ERROR
        return _OK
