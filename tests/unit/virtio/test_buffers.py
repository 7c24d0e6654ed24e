"""Lists of buffers: their division does not change the data."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmm_kvm.scatter import total
from vmm_kvm.virtio.buffers import gather, scatter, split

PARTS = st.lists(st.binary(min_size=1, max_size=20), max_size=8)


def views(parts: list[bytes]) -> list[memoryview]:
    """Return writable views of copies."""
    return [memoryview(bytearray(part)) for part in parts]


@given(PARTS, st.integers(0, 200))
def test_gather(parts: list[bytes], size: int) -> None:
    """Gather returns the first bytes, or all that there are."""
    assert gather(views(parts), size) == b"".join(parts)[:size]
    assert total(views(parts)) == len(b"".join(parts))


@given(PARTS, st.binary(max_size=200))
def test_scatter(parts: list[bytes], data: bytes) -> None:
    """Scatter copies as much as fits, in order, and touches nothing after it."""
    buffers = views(parts)
    before = b"".join(parts)
    count = scatter(buffers, data)
    assert count == min(len(data), len(before))
    assert b"".join(buffers) == data[:count] + before[count:]


@given(PARTS, st.integers(0, 200))
def test_split(parts: list[bytes], at: int) -> None:
    """Both parts together are the whole, and none of their buffers is empty."""
    front, back = split(views(parts), at)
    whole = b"".join(parts)
    assert (b"".join(front), b"".join(back)) == (whole[:at], whole[at:])
    assert all(len(buffer) for buffer in front + back)
