"""Values in requests and answers: names, offsets, times, attributes, and buffers of their data."""

import errno
import os
from collections.abc import Sequence

from vmm_kvm.fs import abi
from vmm_kvm.fs.nodes import Node
from vmm_kvm.fs.tree import AS_IT_IS, NOW, Time, check_name, fail

Views = Sequence[memoryview]
VALID_S = 1
"""How long a guest may believe in a name and in attributes, seconds: the host may change them."""
MASK64 = (1 << 64) - 1

_BUFFERS_MAX = 1024  # of preadv(2)
_OFFSET_MAX = (1 << 63) - 1
_BILLION = 10**9
_PAIR = 2


def name_in(body: bytes) -> bytes:
    """Return the name that arguments end with."""
    name, end, _ = body.partition(b"\0")
    if not end:
        fail(errno.EINVAL)
    check_name(name)
    return name


def names_in(body: bytes) -> tuple[bytes, bytes]:
    """Return two names, the first of something in a directory."""
    pair = body.split(b"\0", _PAIR)[:_PAIR]
    if len(pair) < _PAIR or body.count(b"\0") < _PAIR:
        fail(errno.EINVAL)
    check_name(pair[0])
    return pair[0], pair[1]


def offset_in(value: int) -> int:
    """Return an offset or a size that a file can have."""
    if value > _OFFSET_MAX:
        fail(errno.EINVAL)
    return value


def time_in(valid: int, is_set: int, is_now: int, seconds: int, nanoseconds: int) -> Time:
    """Return a time to be set, from a SETATTR's fields."""
    if not valid & is_set:
        return AS_IT_IS
    if valid & is_now:
        return NOW
    if nanoseconds >= _BILLION:
        fail(errno.EINVAL)
    return Time(seconds - (seconds >> 63 << 64), nanoseconds)


def front(buffers: Views, size: int) -> list[memoryview]:
    """Return the first `size` bytes of buffers, as many as one call takes."""
    front: list[memoryview] = []
    for buffer in buffers:
        if not size or len(front) == _BUFFERS_MAX:
            break
        piece = buffer[:size]
        front.append(piece)
        size -= len(piece)
    return front


def attributes(status: os.stat_result, ino: int) -> bytes:
    """Return a fuse_attr with an inode number."""
    accessed, accessed_ns = divmod(status.st_atime_ns, _BILLION)
    modified, modified_ns = divmod(status.st_mtime_ns, _BILLION)
    changed, changed_ns = divmod(status.st_ctime_ns, _BILLION)
    return abi.ATTR.pack(
        *(ino, status.st_size, status.st_blocks),
        *(accessed & MASK64, modified & MASK64, changed & MASK64),
        *(accessed_ns, modified_ns, changed_ns),
        *(status.st_mode, min(status.st_nlink, 0xFFFF_FFFF), status.st_uid, status.st_gid),
        *(status.st_rdev & 0xFFFF_FFFF, status.st_blksize & 0xFFFF_FFFF, 0),
    )


def attributes_out(status: os.stat_result, ino: int) -> bytes:
    """Return a fuse_attr_out."""
    return abi.ATTR_OUT.pack(VALID_S, 0, 0) + attributes(status, ino)


def entry_out(node: Node, status: os.stat_result, ino: int) -> bytes:
    """Return a fuse_entry_out."""
    return abi.ENTRY_OUT.pack(node.id, 0, VALID_S, VALID_S, 0, 0) + attributes(status, ino)
