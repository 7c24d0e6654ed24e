"""Arrays of reference counts: of any width on disk, of whole bytes in memory.

In memory a count is big-endian, of one byte or more, so that runs of counts are searched,
compared and set as byte strings.

Source: qcow2 specification, "Host cluster management".
"""


def width(bits: int) -> int:
    """Return the bytes of a count in memory that has `bits` bits on disk, 1 to 64."""
    return max(1, bits // 8)


def unpack(data: bytearray, bits: int) -> bytearray:
    """Turn counts as they are on disk into counts as they are in memory."""
    if bits >= 8:
        return data
    # The first count of a byte is in its lowest bits. All bytes are shifted at once, as one
    # large number; what a shift brings in from the next byte is masked.
    number = int.from_bytes(data, "big")
    mask = int.from_bytes(bytes([(1 << bits) - 1]) * len(data), "big")
    step = 8 // bits
    counts = bytearray(len(data) * step)
    for place in range(step):
        counts[place::step] = (number >> (place * bits) & mask).to_bytes(len(data), "big")
    return counts


def pack(counts: bytearray, bits: int) -> bytearray:
    """Turn counts in memory, a multiple of 8 of them, into their form on disk."""
    if bits >= 8:
        return counts
    step = 8 // bits
    number = 0
    for place in range(step):
        number |= int.from_bytes(counts[place::step], "big") << (place * bits)
    return bytearray(number.to_bytes(len(counts) // step, "big"))
