"""A machine in a file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.unit.snapshot.samples import MANIFEST, RANGES, STATE_BYTES, contents, empty, filled
from vmm_kvm.bits import MIB
from vmm_kvm.errors import SnapshotError
from vmm_kvm.memory import GuestMemory
from vmm_kvm.snapshot.file import (
    FileWriter,
    Layout,
    SnapshotFile,
    empty_file,
    write_file,
    write_into,
)
from vmm_kvm.snapshot.ram import runs

LAYOUT = Layout.of(len(STATE_BYTES), MANIFEST.memory_size)


def written(path: Path) -> Path:
    """Write the sample into a file."""
    with filled() as memory:
        write_file(str(path), MANIFEST, STATE_BYTES, memory)
    return path


def opened(path: Path) -> SnapshotFile:
    """Open a snapshot."""
    return SnapshotFile(os.open(path, os.O_RDONLY))


def refusal(path: Path) -> str:
    """Return the refusal of a file."""
    with pytest.raises(SnapshotError) as caught:
        opened(path)
    return str(caught.value)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Memory, state and manifest are read back unchanged."""
    with opened(written(tmp_path / "snap")) as file, empty() as memory, filled() as wanted:
        file.read_ram(memory)
        assert (file.manifest, file.state) == (MANIFEST, STATE_BYTES)
        assert contents(memory) == contents(wanted)


def test_a_file_is_its_owners_alone_and_sparse(tmp_path: Path) -> None:
    """Other users cannot read a guest's secrets, and zeros take no room."""
    found = written(tmp_path / "snap").stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_size == 2 * MIB + 3 * MIB
    assert found.st_blocks * 512 < MIB


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    """A snapshot never replaces an existing file, and leaves nothing behind then."""
    path = tmp_path / "snap"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        written(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["snap"]
    assert path.read_text() == "mine"


def test_nothing_is_left_of_one_that_fails(tmp_path: Path) -> None:
    """A machine that cannot be described leaves no file."""
    with filled() as memory, pytest.raises(SnapshotError):
        write_file(str(tmp_path / "snap"), MANIFEST._replace(cpus=0), STATE_BYTES, memory)
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_that_name_has_another_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without unnamed files, a hidden name is used, and removed."""
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_RDWR)  # refused: it is a directory
    with opened(written(tmp_path / "snap")) as file:
        assert file.manifest == MANIFEST
    assert [entry.name for entry in tmp_path.iterdir()] == ["snap"]


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    """A file that ends within the header, the state or memory is refused."""
    path = written(tmp_path / "snap")
    for size in (5 * MIB - 1, 2 * MIB, 300, 72, 40, 8):
        os.truncate(path, size)
        assert refusal(path) == "header: the file ends too early"
    os.truncate(path, 3)
    assert refusal(path) == "incompatible dump signature"


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """A flipped bit in the manifest or the state fails the checksum."""
    path = written(tmp_path / "snap")
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    assert refusal(path) == "the checksum is wrong: the file is damaged"


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    """A file that is truncated after it was opened is refused, and kills no process."""
    path = written(tmp_path / "snap")
    with opened(path) as file, empty() as memory:
        os.truncate(path, 2 * MIB + 100)
        with pytest.raises(SnapshotError, match="memory: the file ends too early"):
            file.read_ram(memory)


def test_memory_is_mapped_and_the_file_stays(tmp_path: Path) -> None:
    """Mapped memory has the file's contents; a write changes no file."""
    path = written(tmp_path / "snap")
    before = path.read_bytes()
    with opened(path) as file, filled() as wanted:
        expected = contents(wanted)
        mapped = GuestMemory(RANGES, is_private=True, mapped=file.mapped)
    with mapped as memory:
        assert contents(memory) == expected
        memory.write(0, b"changed")
        assert memory.read(0, 7) == b"changed"
    assert path.read_bytes() == before


def test_what_was_in_a_file_is_gone(tmp_path: Path) -> None:
    """The former contents of an open file are gone after a snapshot is written into it."""
    path = tmp_path / "snap"
    path.write_bytes(b"x" * (8 * MIB))
    with path.open("r+b") as file, filled() as memory:
        empty_file(file.fileno())
        write_into(FileWriter(file.fileno(), MANIFEST, LAYOUT), STATE_BYTES, memory)
    assert path.read_bytes() == written(tmp_path / "other").read_bytes()


def test_it_tells_how_far_it_is(tmp_path: Path) -> None:
    """After each run, where that ends in RAM."""
    ends: list[int] = []
    with (tmp_path / "snap").open("w+b") as file, filled() as memory:
        writer = FileWriter(file.fileno(), MANIFEST, LAYOUT, on_run=ends.append)
        write_into(writer, STATE_BYTES, memory)
        assert ends == sorted({offset + len(data) for offset, data in runs(memory)})


def test_disks_that_are_there_stay(tmp_path: Path) -> None:
    """Disks copied after RAM's place, before RAM itself, are part of the file."""
    path, layout = tmp_path / "snap", Layout.of(len(STATE_BYTES), MANIFEST.memory_size, [4096])
    with path.open("w+b") as file, filled() as memory:
        empty_file(file.fileno())
        os.pwrite(file.fileno(), b"disk", layout.disks[0])
        write_into(FileWriter(file.fileno(), MANIFEST, layout), STATE_BYTES, memory)
        assert os.pread(file.fileno(), 5000, layout.disks[0]) == b"disk".ljust(4096, b"\0")


def test_one_that_is_cancelled_is_no_snapshot(tmp_path: Path) -> None:
    """A cancelled snapshot has no header."""
    path = tmp_path / "snap"
    with path.open("w+b") as file, filled() as memory:
        writer = FileWriter(file.fileno(), MANIFEST, LAYOUT, lambda: True)
        with pytest.raises(SnapshotError, match="it was cancelled"):
            write_into(writer, STATE_BYTES, memory)
    assert refusal(path) == "incompatible dump signature"


def test_a_snapshot_goes_into_a_file_alone() -> None:
    """A pipe is refused: it can be read once, and in one direction."""
    read_fd, write_fd = os.pipe()
    try:
        with pytest.raises(SnapshotError, match="not a file"):
            empty_file(write_fd)
    finally:
        os.close(read_fd)
        os.close(write_fd)
