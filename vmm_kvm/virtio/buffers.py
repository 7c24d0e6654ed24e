"""Lists of buffers, as in descriptor chains: buffer boundaries mean nothing for the data.

A driver may split a header, or join it with what follows, as it likes (virtio 1.2 §2.7.4.2).
"""

from collections.abc import Sequence


def gather(buffers: Sequence[memoryview], size: int) -> bytes:
    """Copy the first `size` bytes out of the buffers; fewer if they hold fewer."""
    if buffers and len(buffers[0]) >= size:
        return bytes(buffers[0][:size])
    data = bytearray()
    for buffer in buffers:
        data += buffer[: size - len(data)]
        if len(data) == size:
            break
    return bytes(data)


def scatter(buffers: Sequence[memoryview], data: bytes | memoryview) -> int:
    """Copy `data` into the buffers, as much as they hold; returns how many bytes that is."""
    at = 0
    for buffer in buffers:
        piece = data[at : at + len(buffer)]
        buffer[: len(piece)] = piece
        at += len(piece)
        if at == len(data):
            break
    return at


def split(buffers: Sequence[memoryview], at: int) -> tuple[list[memoryview], list[memoryview]]:
    """Divide the buffers behind byte `at` of the data; no part of the result is empty."""
    for number, buffer in enumerate(buffers):
        size = len(buffer)
        if at < size:
            front, back = list(buffers[:number]), list(buffers[number + 1 :])
            if at:
                front.append(buffer[:at])
            return front, [buffer[at:], *back]
        at -= size
    return list(buffers), []
