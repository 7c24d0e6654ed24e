"""Any operations on a small qcow2 image have the same effect as on an array of bytes."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.block.crash import checked
from vmm_kvm.block.image import Format
from vmm_kvm.images.opening import open_image

SIZE = 160 << 10
OPTIONS = (
    "cluster_size=512,refcount_bits=64",
    "cluster_size=512,compat=0.10",
    "cluster_size=4096,refcount_bits=1",
    "cluster_size=16384,extended_l2=on",
    "cluster_size=65536",
)

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(("write", "write", "zero", "unmap", "discard", "flush", "reopen")),
        st.integers(0, SIZE - 1),
        st.one_of(st.integers(1, 2000), st.integers(1, SIZE)),
        st.booleans(),
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def images() -> Iterator[list[bytes]]:
    """Make empty images of several kinds."""
    with tempfile.TemporaryDirectory() as directory:
        found = []
        for options in OPTIONS:
            path = f"{directory}/disk"
            create = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
            subprocess.run(create, check=True)
            found.append(Path(path).read_bytes())
        yield found


@pytest.mark.usefixtures("qemu_img")
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(kind=st.integers(0, len(OPTIONS) - 1), operations=OPERATIONS)
def test_operations(
    images: list[bytes], tmp_path: Path, kind: int, operations: list[tuple[str, int, int, bool]]
) -> None:
    """Reads return written data, zeros, or (after a discard) zeros; the image stays clean."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(images[kind])
    model = bytearray(SIZE)
    image = open_image(str(path), Format.QCOW2, False)
    try:
        for number, (what, start, length, is_aligned) in enumerate(operations):
            offset = start & ~0xFFF if is_aligned else start
            size = min(length, SIZE - offset)
            match what:
                case "write":
                    data = bytes([number + 1]) * size
                    image.writev(offset, [memoryview(data)])
                    model[offset : offset + size] = data
                case "zero" | "unmap":
                    image.write_zeroes(offset, size, may_unmap=what == "unmap")
                    model[offset : offset + size] = bytes(size)
                case "discard":
                    image.discard(offset, size)
                    found = bytearray(size)
                    image.readv(offset, [memoryview(found)])
                    before = model[offset : offset + size]
                    assert [n for n, o in zip(found, before, strict=True) if n not in {0, o}] == []
                    model[offset : offset + size] = found
                case "flush":
                    image.flush()
                case _:
                    image.close()
                    image = open_image(str(path), Format.QCOW2, False)
            everything = bytearray(SIZE)
            image.readv(0, [memoryview(everything)])
            assert everything == model
    finally:
        image.close()
    report = checked(str(path))
    assert (report.errors, report.leaked_clusters) == ((), 0)
