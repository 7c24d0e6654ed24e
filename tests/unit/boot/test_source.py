"""Files to boot from: refusals, reading, and placing them in memory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm_kvm.boot.source import BytesSource, FileSource, Source
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory


def _sources(path: Path) -> list[Source]:
    return [FileSource.open(str(path)), BytesSource(str(path), path.read_bytes())]


def test_missing_file(tmp_path: Path) -> None:
    """A missing file is named with the reason."""
    with pytest.raises(BootError) as caught:
        FileSource.open(f"{tmp_path}/none")
    assert f"{tmp_path}/none: No such file or directory" == str(caught.value)


def test_directory(tmp_path: Path) -> None:
    """A directory is refused."""
    with pytest.raises(BootError) as caught:
        FileSource.open(str(tmp_path))
    assert f"{tmp_path}: is a directory" == str(caught.value)


def test_fifo_does_not_block(tmp_path: Path) -> None:
    """A FIFO without a writer is refused at once."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BootError) as caught:
        FileSource.open(f"{tmp_path}/fifo")
    assert f"{tmp_path}/fifo: not a regular file" == str(caught.value)


def test_empty_file(write: Callable[[bytes], str]) -> None:
    """An empty file is refused."""
    path = write(b"")
    with pytest.raises(BootError) as caught:
        FileSource.open(path)
    assert f"{path}: empty file" == str(caught.value)


def test_nul_in_path() -> None:
    """A path that system calls refuse is an error like any other."""
    with pytest.raises(BootError, match=r"'a\\x00b': a path has no NUL"):
        FileSource.open("a\0b")


def test_reads_pieces(write: Callable[[bytes], str]) -> None:
    """Any piece inside can be read, from a file as from bytes."""
    path = Path(write(bytes(range(100))))
    for source in _sources(path):
        assert (100, bytes(range(10, 30))) == (source.size, source.read(10, 20))


@pytest.mark.parametrize(("offset", "size"), [(90, 11), (101, 0), (-1, 4), (0, -1), (1 << 70, 1)])
def test_reads_nothing_outside(write: Callable[[bytes], str], offset: int, size: int) -> None:
    """A piece that is not wholly inside is truncated, for any numbers."""
    for source in _sources(Path(write(bytes(100)))):
        with pytest.raises(BootError, match="truncated"):
            source.read(offset, size)


def test_places_at_any_offset(write: Callable[[bytes], str], memory: GuestMemory) -> None:
    """File offset and address need no alignment; surrounding memory stays unchanged."""
    data = os.urandom(20_000)
    for index, source in enumerate(_sources(Path(write(data)))):
        gpa = 0x10_0003 + index * 0x10_0000
        source.place(memory, gpa, 77, 19_000)
        assert bytes(8) + data[77:19_077] + bytes(8) == memory.read(gpa - 8, 19_016)


def test_places_nothing(write: Callable[[bytes], str], memory: GuestMemory) -> None:
    """Zero bytes can be placed at any address."""
    for source in _sources(Path(write(b"x"))):
        source.place(memory, 0x1000, 1, 0)
        assert bytes(16) == memory.read(0x1000, 16)


def test_file_that_shrinks_is_an_error(write: Callable[[bytes], str], memory: GuestMemory) -> None:
    """A file that is truncated after it was opened ends in an error, not in SIGBUS."""
    path = write(bytes(100_000))
    source = FileSource.open(path)
    os.truncate(path, 50_000)
    with pytest.raises(BootError, match="truncated while it was read"):
        source.read(0, 100_000)
    with pytest.raises(BootError, match="truncated while it was read"):
        source.place(memory, 0x10_0000, 0, 100_000)


def test_places_without_sendfile(write: Callable[[bytes], str], memory: GuestMemory) -> None:
    """If sendfile fails, here because memory is opened to append, bytes are copied."""
    fcntl.fcntl(memory.fd, fcntl.F_SETFL, os.O_APPEND)
    source = FileSource.open(write(bytes(range(256))))
    source.place(memory, 0x1003, 5, 250)
    assert bytes(range(5, 255)) == memory.read(0x1003, 250)
