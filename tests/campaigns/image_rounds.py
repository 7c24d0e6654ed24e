"""Shared by campaigns that kill the writer of a qcow2 image.

A campaign kills once a round. The next round continues with the image that a kill has left; after a
sixth of the rounds an image of another kind replaces it.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from tests.unit.block.crash import checked
from vmm_kvm.block.image import Format
from vmm_kvm.images.opening import open_image

SECTOR = 512
OPTIONS = (
    "cluster_size=65536",
    "cluster_size=4096",
    "cluster_size=65536,extended_l2=on",
    "cluster_size=512",
    "cluster_size=65536,lazy_refcounts=on",
    "cluster_size=2M,refcount_bits=64",
)
_REPORTED = 5  # deviations of one round

Disk = TypeVar("Disk")


class Round(NamedTuple):
    """The result of one kill."""

    operations: int
    """The number of operations that the campaign counts: those begun, or acknowledged."""
    wrong: list[str]


def examine(path: str, size: int) -> tuple[bytes, list[str]]:
    """Check an image of `size` bytes that no program has open; return its contents and faults.

    Ours and `qemu-img check` may find only leaks.
    """
    wrong = list(checked(path).errors)
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", path], check=False, capture_output=True, text=True
    )
    if done.returncode not in {0, 3}:  # 3: leaks
        wrong.append(f"qemu-img check: {done.returncode}: {done.stdout}{done.stderr}")
    image = open_image(path, Format.QCOW2, True)
    found = bytearray(size)
    image.readv(0, [memoryview(found)])
    image.close()
    return bytes(found), wrong


def run_rounds(
    count: int,
    seed: int,
    size: int,
    make_disk: Callable[[], Disk],
    run_round: Callable[[str, Disk, random.Random, int], Round],
) -> tuple[int, list[str]]:
    """Kill `count` times; return the number of operations, and the deviations.

    Progress is printed with each new image.

    Args:
        count: number of rounds; the images take turns within them.
        seed: of the generator that each round gets.
        size: of the images, bytes.
        make_disk: makes the model of a new image.
        run_round: does a round, with the image's path, its model, the generator, and the
        round's number.
    """
    chance = random.Random(seed)
    operations, deviations = 0, []
    begun = time.monotonic()
    per_image = max(count // len(OPTIONS), 1)
    with tempfile.TemporaryDirectory(prefix="kill-") as directory:
        for number in range(count):
            if number % per_image == 0:
                path = f"{directory}/disk{number}.qcow2"
                features = OPTIONS[number // per_image % len(OPTIONS)]
                taken = time.monotonic() - begun
                print(f"round {number} of {count}, after {taken:.0f} s: {features}", flush=True)
                command = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", features, path)
                subprocess.run([*command, str(size)], check=True)
                disk = make_disk()
            done = run_round(path, disk, chance, number)
            operations += done.operations
            deviations += [f"round {number}, {features}: {line}" for line in done.wrong[:_REPORTED]]
    return operations, deviations


def run_campaign(
    description: str,
    noun: str,
    campaign: Callable[[int, int], tuple[int, list[str]]],
    arguments: Sequence[str] | None,
) -> int:
    """Run a campaign as its command line says, and print its summary; returns the exit status.

    `noun` names the campaign's operations.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--count", type=int, default=300, help="how many kills")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    operations, deviations = campaign(options.count, options.seed)
    for line in deviations:
        print(line)
    taken = time.monotonic() - begun
    print(
        f"{options.count} kills, {operations} {noun}, {taken:.0f} s: {len(deviations)} deviations"
    )
    return 1 if deviations else 0
