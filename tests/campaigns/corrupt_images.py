"""Campaign: corrupted disk images, opened, read, written, checked and copied.

A set of sound images of every kind is made with `qemu-img`. Each case takes one, breaks it (bits,
words of extreme values and pointers in the header, the tables or anywhere; truncation; pieces
swapped) and uses it as a machine and as `vmctl image` would. Each use may succeed, or raise an
ImageError or an OSError of one line; never another exception. Time and memory of a case are
limited.

Any deviation is printed, with the seed that repeats it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from vmm_kvm.block.file import HostFile  # noqa: E402
from vmm_kvm.block.image import Format, Image  # noqa: E402
from vmm_kvm.block.qcow2.check import check  # noqa: E402
from vmm_kvm.block.qcow2.header import read_header  # noqa: E402
from vmm_kvm.block.qcow2.snapshots import read_snapshots  # noqa: E402
from vmm_kvm.errors import ImageError  # noqa: E402
from vmm_kvm.images.opening import image_chain, open_image  # noqa: E402

TIMEOUT_S = 5.0
"""Seconds of processor time, which does not depend on other work on the machine."""
MEMORY_BYTES = 512 << 20
SIZE = 4 << 20
KINDS = (
    "cluster_size=512",
    "cluster_size=4096,compat=0.10",
    "cluster_size=4096,refcount_bits=1",
    "cluster_size=16384,extended_l2=on",
    "cluster_size=65536,compression_type=zstd",
    "cluster_size=65536,lazy_refcounts=on,refcount_bits=64",
    "cluster_size=2M",
)
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, (1 << 64) - 1)


class HangError(BaseException):
    """A case takes too long."""


def make_seeds(directory: Path) -> list[bytes]:
    """Return sound images of every kind: data, holes, zeros, compressed clusters, a snapshot."""
    found = []
    for number, kind in enumerate(KINDS):
        plain = directory / f"plain{number}.qcow2"
        create = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", kind, plain, str(SIZE))
        subprocess.run(create, check=True)
        for command in ("write -P 1 1M 300k", "write -z 2M 128k", "write -c -P 3 2M 2M"):
            # A part that does not compress in this way does not matter here.
            subprocess.run(["qemu-io", "-c", command, plain], check=False, capture_output=True)
        if "refcount_bits=1" not in kind:
            subprocess.run(["qemu-img", "snapshot", "-c", "one", plain], check=True)
        subprocess.run(
            ["qemu-io", "-c", "write -P 4 900k 200k", plain], check=True, capture_output=True
        )
        found.append(plain.read_bytes())
        plain.unlink()
    return found


def corrupted(sound: bytes, chance: random.Random) -> bytearray:
    """Return an image with one to four faults."""
    data = bytearray(sound)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        # The header, the start of each cluster (where tables begin), or anywhere.
        where = chance.choice(("header", "tables", "anywhere"))
        if where == "header":
            at = chance.randrange(min(len(data), 200))
        elif where == "tables":
            at = chance.randrange(len(data)) & ~0x1FF
            at += chance.randrange(8) * 8
        else:
            at = chance.randrange(len(data))
        at = min(at, len(data) - 8)
        match chance.randrange(6):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                size = chance.choice((1, 2, 4, 8))
                value = chance.choice(EXTREMES) & ((1 << 8 * size) - 1)
                data[at : at + size] = value.to_bytes(size, "big")
            case 2:  # a pointer into the file, with flags
                value = chance.randrange(len(data)) & ~0x1FF | chance.choice((0, 1, 2, 3)) << 62
                at &= ~7
                data[at : at + 8] = (value | chance.choice((0, 0, 1))).to_bytes(8, "big")
            case 3:
                size = min(chance.choice((8, 512, 4096)), len(data) - at)
                other = chance.randrange(len(data) - size + 1)
                data[at : at + size] = data[other : other + size]
            case 4:
                size = min(chance.choice((8, 512, 65536)), len(data) - at)
                data[at : at + size] = chance.choice((b"\0", b"\xff")) * size
            case _:
                if len(data) > 1024 and chance.random() < 0.3:
                    del data[chance.randrange(512, len(data)) :]
    return data


def use(path: str, chance: random.Random) -> None:
    """Do all that programs do with an image."""
    tries: list[Callable[[], object]] = [
        lambda: image_chain(path, None),
        lambda: _check(path),
        lambda: _read_all(path),
        lambda: _change(path, chance),
        lambda: _check(path),
        lambda: _read_all(path),
    ]
    for attempt in tries:
        try:
            attempt()
        except (ImageError, OSError) as err:
            if "\n" in str(err) or not str(err).isprintable():
                raise AssertionError(f"not a line: {err}") from err


def _check(path: str) -> None:
    file = HostFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), path, is_read_only=True)
    try:
        header = read_header(file)
        read_snapshots(file, header)
        check(file, header)
    finally:
        file.close()


def _read_all(path: str) -> None:
    image = open_image(path, Format.QCOW2, True)
    try:
        _read(image, 0, min(image.size, 2 * SIZE))
        _read(image, max(image.size - 70_000, 0), 70_000)
    finally:
        image.close()


def _read(image: Image, offset: int, size: int) -> None:
    data = memoryview(bytearray(65536))
    for start in range(offset, offset + size, len(data)):
        try:
            image.readv(start, [data])
        except OSError:  # the next cluster may be readable
            continue


def _change(path: str, chance: random.Random) -> None:
    image = open_image(path, Format.QCOW2, False)
    try:
        for _ in range(12):
            size = chance.choice((512, 65536, 200_000))
            offset = chance.randrange(max(image.size - size, 1)) & ~511
            if chance.random() < 0.8:
                offset %= 2 * SIZE
            if offset + size > image.size:
                continue
            try:
                match chance.randrange(5):
                    case 0 | 1:
                        image.writev(offset, [memoryview(bytes([7]) * size)])
                    case 2:
                        image.write_zeroes(offset, size, may_unmap=chance.random() < 0.5)
                    case 3:
                        image.discard(offset, size)
                    case _:
                        image.flush()
            except OSError:
                continue
    finally:
        image.close()


def _hang(_: int, __: FrameType | None) -> NoReturn:
    raise HangError


def run_case(sound: Sequence[bytes], seed: int, directory: Path) -> str | None:
    """Run one case; return its deviation, if there is one."""
    chance = random.Random(seed)
    path = directory / "corrupt.qcow2"
    path.write_bytes(corrupted(chance.choice(sound), chance))
    old = signal.signal(signal.SIGPROF, _hang)
    signal.setitimer(signal.ITIMER_PROF, TIMEOUT_S)
    try:
        use(str(path), chance)
    except HangError:
        return f"seed {seed}: more than {TIMEOUT_S} s\n{traceback.format_exc()}"
    except Exception:  # noqa: BLE001 - whatever it is, it must not be
        return f"seed {seed}: {traceback.format_exc()}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
        path.unlink()
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="how many images")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.CRITICAL)
    started = time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="corrupt-images-") as directory:
        sound = make_seeds(Path(directory))
        for seed in range(options.seed, options.seed + options.count):
            deviation = run_case(sound, seed, Path(directory))
            counts["deviates" if deviation else "fine"] += 1
            if deviation:
                print(deviation)
    took = time.monotonic() - started
    print(f"{options.count} images in {took:.0f} s, {counts['deviates']} deviations")
    return 1 if counts["deviates"] else 0


if __name__ == "__main__":
    sys.exit(main())
