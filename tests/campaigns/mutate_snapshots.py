"""Campaign: mutated snapshots, files and streams, as programs that restore them read them.

A small machine is the seed, as a file and as a stream, raw and compressed. Each case breaks one:
bits, words of extreme values, pieces moved, dropped and doubled, truncation; or fields of its
manifest and the index of its state, and then mends sizes and checksums, so that the reader finds
the fault by its contents. The reader may accept it, or refuse it in one line; never another
exception. Time and memory of a case are limited.

Any deviation is printed, with the seed that repeats it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.unit.snapshot.samples import (  # noqa: E402 - after the path
    MANIFEST,
    STATE_BYTES,
    Buffer,
    empty,
    filled,
    live_stream,
    stream,
)
from vmm_kvm.bits import MIB  # noqa: E402
from vmm_kvm.errors import SnapshotError  # noqa: E402
from vmm_kvm.snapshot import state as states  # noqa: E402
from vmm_kvm.snapshot.file import SnapshotFile, write_file  # noqa: E402
from vmm_kvm.snapshot.stream import StreamReader  # noqa: E402

TIMEOUT_S = 5.0
MEMORY = 512 * MIB
"""Memory beyond this process's at the start, the limit of a case."""
EXTREMES = (0, 1, -1, 0xFF, 0xFFFF, 1 << 31, 0xFFFF_FFFF, 1 << 62, (1 << 64) - 1, 4096, 2 << 20)
VALUES: tuple[object, ...] = (
    *(None, True, False, "", "x" * 5000, "\0", "\ud800", [], {}, [[]], [{}], {"": None}, 1.5),
    *(0, -1, 1, 64, 65, 4095, 1 << 20, 1 << 31, 1 << 63, 1 << 64, 1 << 200, [0] * 100),
)
_HEAD = struct.Struct("<8sI")
_FILE_HEAD = struct.Struct("<8sIIQQQ32s")


class HangError(BaseException):
    """A case takes too long."""


class Seeds:
    """The machine, as files and as streams."""

    def __init__(self, directory: Path) -> None:
        self.streams = (stream(), stream(compresses=True), live_stream())
        path = directory / "seed.snap"
        with filled() as memory:
            write_file(str(path), MANIFEST, STATE_BYTES, memory)
        self.file = path.read_bytes()
        path.unlink()


def broken(data: bytes, chance: random.Random, most: int) -> bytes:
    """Return bytes with one to eight faults, mostly within the first `most`."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        limit = len(found) if chance.random() < 0.2 else min(most, len(found))
        at = chance.randrange(limit + 1) if limit else 0
        match chance.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << chance.randrange(8)
            case 1:
                size = chance.choice((1, 2, 4, 8))
                value = chance.choice(EXTREMES) & ((1 << 8 * size) - 1)
                found[at : at + size] = value.to_bytes(size, chance.choice(("little", "big")))
            case 2:
                del found[at:]
            case 3:
                del found[at : at + chance.randrange(1, 300)]
            case 4:
                found[at:at] = found[at : at + chance.randrange(1, 300)]
            case _:
                start = chance.randrange(len(found) + 1)
                found[at : at + 64] = found[start : start + 64]
    return bytes(found)


def retold(text: bytes, chance: random.Random) -> bytes:
    """Return a JSON text with one to three values changed, fields added, or fields removed."""
    value = json.loads(text)
    for _ in range(chance.randrange(1, 4)):
        value = _changed(value, chance)
    return json.dumps(value).encode()


def _changed(value: object, chance: random.Random) -> object:
    if isinstance(value, dict) and value and chance.random() < 0.95:
        name = chance.choice(sorted(value))
        match chance.randrange(8):
            case 0:
                del value[name]
            case 1:
                value[chance.choice(("more", "parts", "x" * 300))] = chance.choice(VALUES)
            case _:
                value[name] = _changed(value[name], chance)
        return value
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        match chance.randrange(4):
            case 0:
                del value[at]
            case 1:
                value.insert(at, chance.choice(VALUES))
            case _:
                value[at] = _changed(value[at], chance)
        return value
    if type(value) is int and chance.random() < 0.5:
        return value + chance.choice((-1, 1, -4096, 4096, 1 << 32))
    return chance.choice(VALUES)


def told_stream(data: bytes, chance: random.Random) -> bytes:
    """Return a stream with another manifest or index, whose sizes and checksum are right."""
    size = _HEAD.unpack_from(data)[1]
    start = _HEAD.size + size
    if not json.loads(data[_HEAD.size : start])["state_size"]:  # it follows the RAM
        text, rest = retold(data[_HEAD.size : start], chance), data[start:-32]
        body = _HEAD.pack(data[:8], len(text)) + text + rest
        return body + hashlib.sha256(body).digest()
    text, state = data[_HEAD.size : start], data[start : start + len(STATE_BYTES)]
    rest = data[start + len(STATE_BYTES) : -32]
    text, state = _retold(text, state, chance)
    body = _HEAD.pack(data[:8], len(text)) + text + state + rest
    return body + hashlib.sha256(body).digest()


def _retold(text: bytes, state: bytes, chance: random.Random) -> tuple[bytes, bytes]:
    if chance.random() < 0.5:
        return retold(text, chance), state
    size = int.from_bytes(state[:4], "little")
    index = retold(state[4 : 4 + size], chance)
    state = len(index).to_bytes(4, "little") + index + state[4 + size :]
    fields = {**json.loads(text), "state_size": len(state)}
    return json.dumps(fields).encode(), state


def told_file(data: bytes, chance: random.Random) -> bytes:
    """Return a file with another manifest or index, whose checksum is right."""
    magic, size, flags, state_size, start, ram, _ = _FILE_HEAD.unpack_from(data)
    at = _FILE_HEAD.size + size
    text, state = _retold(data[_FILE_HEAD.size : at], data[at : at + state_size], chance)
    digest = hashlib.sha256(text + state).digest()
    head = _FILE_HEAD.pack(magic, len(text), flags, len(state), start, ram, digest)
    front = (head + text + state).ljust(start, b"\0")
    return front + data[start:]


def read_stream(data: bytes, chance: random.Random) -> None:
    """Read a case as a receiver does."""
    reader = StreamReader(Buffer(data, chance.choice((7, 4096, 1 << 20))))
    with empty(is_private=chance.random() < 0.5) as memory:
        states.decode(reader.read_machine(memory))


def read_file(data: bytes) -> None:
    """Read a case as a start from a file does."""
    fd = os.memfd_create("mutated")
    os.truncate(fd, len(data))
    for at in range(0, len(data), 4096):
        if any(piece := data[at : at + 4096]):
            os.pwrite(fd, piece, at)
    with SnapshotFile(fd) as file:
        states.decode(file.state)
        with empty() as memory:
            file.read_ram(memory)


def run_case(seeds: Seeds, seed: int) -> tuple[str, str | None]:
    """Run one case; return the outcome, and the deviation, if there is one."""
    chance = random.Random(seed)
    try:
        is_file = chance.random() < 0.3
        tells = chance.random() < 0.6
        if is_file:
            data = told_file(seeds.file, chance) if tells else broken(seeds.file, chance, 1200)
        else:
            sound = chance.choice(seeds.streams)
            data = told_stream(sound, chance) if tells else broken(sound, chance, 1800)
    except (ValueError, struct.error):  # the changes contradict each other
        return "unmade", None
    old = signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT_S)
    try:
        if is_file:
            read_file(data)
        else:
            read_stream(data, chance)
    except SnapshotError as err:
        text = str(err)
        if text and text.isprintable() and len(text) < 1000:
            return "refused", None
        return "deviates", f"seed {seed}: not a line: {text!r}"
    except HangError:
        return "deviates", f"seed {seed}: more than {TIMEOUT_S} s\n{traceback.format_exc()}"
    except Exception:  # noqa: BLE001 - whatever it is, it must not be
        return "deviates", f"seed {seed}: {traceback.format_exc()}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    return "accepted", None


def _hang(_: int, __: FrameType | None) -> NoReturn:
    raise HangError


def _limit_memory() -> None:
    """Limit this process's memory to MEMORY more than it has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="how many snapshots")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="snapshots-") as directory:
        seeds = Seeds(Path(directory))
    _limit_memory()
    started = time.monotonic()
    counts: Counter[str] = Counter()
    for seed in range(options.seed, options.seed + options.count):
        outcome, deviation = run_case(seeds, seed)
        counts[outcome] += 1
        if deviation:
            print(deviation)
    took = time.monotonic() - started
    outcomes = ", ".join(f"{counts[name]} {name}" for name in ("accepted", "refused", "unmade"))
    print(f"{options.count} snapshots in {took:.0f} s: {outcomes}, {counts['deviates']} deviations")
    return 1 if counts["deviates"] else 0


if __name__ == "__main__":
    sys.exit(main())
