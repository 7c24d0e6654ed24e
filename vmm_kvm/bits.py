"""Arithmetic on addresses and bit fields that every layer shares."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE_SIZE = 4096


def all_ones(size: int) -> int:
    """Return the value of an unclaimed read: `size` bytes of 0xff."""
    return (1 << (8 * size)) - 1


def align_up(value: int, alignment: int) -> int:
    """Round `value` up to a multiple of `alignment`, a power of two."""
    return (value + alignment - 1) & ~(alignment - 1)


def align_down(value: int, alignment: int) -> int:
    """Round `value` down to a multiple of `alignment`, a power of two."""
    return value & ~(alignment - 1)
