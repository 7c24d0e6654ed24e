"""Block devices of the host that are disks of guests."""

import array
import fcntl

_BLKROGET = 0x125E


def is_read_only_device(fd: int) -> bool:
    """Tell whether the block device open at `fd` takes no writes, however it was opened.

    Raises:
        OSError: it is no block device.

    Source: Linux include/uapi/linux/fs.h, BLKROGET
    """
    answer = array.array("i", [0])
    fcntl.ioctl(fd, _BLKROGET, answer)
    return bool(answer[0])
