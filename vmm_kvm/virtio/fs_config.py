"""The configuration space of a virtio-fs device.

Source: virtio 1.3 §5.11.4
"""

import struct
from typing import Final

REQUEST_QUEUES = 1

_CONFIG: Final = struct.Struct("<36sI")


def config_of(tag: bytes) -> bytes:
    """Return the configuration space: the tag, and the number of request queues."""
    return _CONFIG.pack(tag, REQUEST_QUEUES)
