"""Parts and contents of scatter lists."""

from collections.abc import Sequence

_ZEROS = memoryview(bytes(1 << 20))


def cut(buffers: Sequence[memoryview], start: int, size: int) -> list[memoryview]:
    """Return the `size` bytes from `start` of what `buffers` hold, without copying."""
    found = []
    for buffer in buffers:
        length = len(buffer)
        if start >= length:
            start -= length
            continue
        piece = buffer[start : start + size]
        found.append(piece)
        size -= len(piece)
        if not size:
            break
        start = 0
    return found


def fill(buffers: Sequence[memoryview], data: memoryview | bytes) -> None:
    """Copy `data`, as long as all of `buffers`, into them."""
    start = 0
    for buffer in buffers:
        buffer[:] = data[start : start + len(buffer)]
        start += len(buffer)


def fill_zeros(buffers: Sequence[memoryview]) -> None:
    """Clear every byte of `buffers`."""
    for buffer in buffers:
        for start in range(0, len(buffer), len(_ZEROS)):
            piece = buffer[start : start + len(_ZEROS)]
            piece[:] = _ZEROS[: len(piece)]


def zeros(size: int) -> list[memoryview]:
    """Return a scatter list of `size` zero bytes; it is read-only."""
    found = [_ZEROS] * (size // len(_ZEROS))
    if size % len(_ZEROS):
        found.append(_ZEROS[: size % len(_ZEROS)])
    return found
