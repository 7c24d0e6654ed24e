"""Crashes at every moment of a write load: the image stays sound, and keeps flushed data."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.unit.block.crash import (
    History,
    after_kill,
    after_power_loss,
    checked,
    contents,
    open_journal,
    write_file,
)
from vmm_kvm.block.image import Format, StoredImage
from vmm_kvm.images.opening import open_image

SEED = int(os.environ.get("VMM_FUZZ_SEED", "1"))
COUNT = max(int(os.environ.get("VMM_FUZZ_COUNT", "0")) // 10, 10)
CRASHES = 24
OPTIONS = (
    "cluster_size=512",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=4096",
    "cluster_size=4096,compat=0.10",
    "cluster_size=65536",
    "cluster_size=65536,extended_l2=on",
    "cluster_size=16384,extended_l2=on,refcount_bits=8",
)
SIZE = 1 << 20
LENGTHS = (512, 4096, 65536, 200 * 512)


def make(directory: Path, chance: random.Random) -> tuple[str, StoredImage | None]:
    """Make an image with some data, perhaps with a base, perhaps with a snapshot."""
    path = str(directory / "disk.qcow2")
    options = chance.choice(OPTIONS)
    base = None
    arguments: tuple[str, ...] = ()
    if chance.random() < 0.5:
        write_file(directory / "base.raw", chance.randbytes(SIZE // 2))
        arguments = ("-b", "base.raw", "-F", "raw")
        base = open_image(str(directory / "base.raw"), Format.RAW, True)
    command = ("qemu-img", "create", "-q", "-f", "qcow2", *arguments, "-o", options, path)
    subprocess.run([*command, str(SIZE)], check=True)
    commands = ("write -P 7 65536 131072", "write -P 9 700k 200k")
    for command_text in commands:
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", command_text, path], check=True, capture_output=True
        )
    if chance.random() < 0.4 and "refcount_bits=1" not in options:
        subprocess.run(["qemu-img", "snapshot", "-c", "one", path], check=True)
    return path, base


@pytest.mark.usefixtures("qemu_img")
@pytest.mark.parametrize("seed", range(SEED, SEED + COUNT))
def test_crash(seed: int, tmp_path: Path) -> None:
    """At any moment the image has at most leaks, and all flushed data."""
    chance = random.Random(seed)
    path, base = make(tmp_path, chance)
    before = Path(path).read_bytes()
    history = History(contents(path, base))
    journal, image = open_journal(path, base)
    histories: list[tuple[int, History]] = [(0, history.copy())]
    for _ in range(chance.randrange(3, 25)):
        offset = chance.randrange(SIZE // 512) * 512
        size = min(chance.choice(LENGTHS), SIZE - offset)
        match chance.choice(
            ("write", "write", "write", "write", "zero", "unmap", "discard", "flush")
        ):
            case "write":
                data = chance.randbytes(size)
                history.write(offset, data)
                histories.append((len(journal.events), history.copy()))
                image.writev(offset, [memoryview(data)])
            case "zero" | "unmap" as what:
                history.write(offset, bytes(size))
                histories.append((len(journal.events), history.copy()))
                image.write_zeroes(offset, size, may_unmap=what == "unmap")
            case "discard":
                history.write(offset, bytes(size))
                histories.append((len(journal.events), history.copy()))
                image.discard(offset, size)
                after = bytearray(size)
                image.readv(offset, [memoryview(after)])
                history.write(offset, bytes(after))
                histories.append((len(journal.events), history.copy()))
            case _:
                image.flush()
                history.flush()
                histories.append((len(journal.events), history.copy()))
    image.flush()
    history.flush()
    histories.append((len(journal.events), history.copy()))
    image.close()
    base = open_image(str(tmp_path / "base.raw"), Format.RAW, True) if base else None
    events = journal.events
    for number in range(CRASHES):
        moment = chance.randrange(len(events) + 1) if number else len(events)
        is_kill = number % 2 == 1
        if is_kill:
            left = after_kill(before, events[:moment])
        else:
            left = after_power_loss(before, events[:moment], chance)
        crashed = write_file(tmp_path / "crashed.qcow2", left)
        report = checked(crashed)
        told = f"{'process' if is_kill else 'host'} died at {moment} of {len(events)}"
        assert report.errors == (), told
        allowed = [known for at, known in histories if at <= moment][-1]
        lost = allowed.lost(contents(crashed, base))
        assert lost == [], told
        if number < 3:
            done = subprocess.run(
                ["qemu-img", "check", "-f", "qcow2", crashed], check=False, capture_output=True
            )
            assert done.returncode in {0, 3}, done.stdout + done.stderr
    if base:
        base.close()
