"""Run fuzz targets: with atheris, guided by coverage, or without.

    python -m tests.fuzz.harness [--seconds N] [--count N] [--seed N] [TARGET...]

A target is a module of this folder with `run(data)`, which raises an exception at a fault, and
`seeds()`, the inputs to start with; its corpus is a folder below `corpus/`. With atheris each runs
for so many seconds in a process of its own, which leaves new inputs that cover more, and inputs
that fail, in `out/fuzz/TARGET`. Without atheris, COUNT random changes of the corpus are run
instead.

    python -m tests.fuzz.harness --minimise TARGET...

makes the committed corpus anew: the seeds, and the smallest inputs of the corpus and of
`out/fuzz/TARGET` that together cover all arcs between lines that all of them cover.

    python -m tests.fuzz.harness --input FILE TARGET

runs one input, such as one that has failed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Protocol, cast

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OUT = ROOT / "out" / "fuzz"
TARGETS = (
    "agent_answers",
    "agent_archives",
    "boot_images",
    "client_messages",
    "fuse_requests",
    "fw_cfg",
    "internal_messages",
    "local_frames",
    "qcow2",
    "vhost_user_client",
    "vhost_user_server",
    "virtqueue",
    "vm_conf",
    "vsock",
)
CORPUS_MAX = 200 << 10
"""Bytes of one target's corpus."""
INPUT_MAX = 64 << 10
"""Bytes of one input, those of atheris too."""
_TIMEOUT_S = 20
_MEMORY_MIB = 2048
_PACKAGES = ("vmm_kvm", "vmd", "vmctl")
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, (1 << 64) - 1)

Arc = tuple[str, int, int]
"""A file, and the lines between which control passed."""


class Target(Protocol):
    """A module with a target."""

    def run(self, data: bytes) -> None:
        """Run one input; any exception is a finding."""

    def seeds(self) -> list[bytes]:
        """Return the inputs to start with."""


class Figures(NamedTuple):
    """The results of a run of atheris."""

    executions: int
    edges: int
    """Edges between instructions that atheris has counted."""
    seconds: int


def target(name: str) -> Target:
    """Import a target."""
    return cast("Target", importlib.import_module(f"tests.fuzz.{name}"))


def corpus(name: str) -> list[Path]:
    """Return the committed inputs of a target."""
    return sorted((HERE / "corpus" / name).iterdir())


def run_input(one: Target, data: bytes) -> None:
    """Run one input, and check that the target leaves no descriptor open."""
    before = os.listdir("/proc/self/fd")  # noqa: PTH208 - by far the fastest way
    one.run(data)
    after = os.listdir("/proc/self/fd")  # noqa: PTH208
    assert len(before) == len(after), f"descriptors: {before} before, {after} after"


# Without atheris


def changed(inputs: Sequence[bytes], chance: random.Random) -> bytes:
    """Return one of the inputs with one to eight changes."""
    data = bytearray(chance.choice(inputs))
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                size = chance.choice((1, 2, 4, 8))
                value = chance.choice(_EXTREMES) & (1 << 8 * size) - 1
                data[at : at + size] = value.to_bytes(size, chance.choice(("little", "big")))
            case 2:
                del data[at : at + chance.choice((1, 2, 8, 64))]
            case 3:
                data[at:at] = data[at : at + chance.choice((1, 4, 16, 64))]
            case 4:
                other = chance.choice(inputs)
                start = chance.randrange(len(other) + 1)
                data[at:at] = other[start : start + chance.randrange(64)]
            case _:
                data[at : at + 1] = chance.randbytes(chance.randrange(4))
    return bytes(data[:INPUT_MAX])


def run_changes(name: str, count: int, seed: int) -> None:
    """Run `count` changes of a target's corpus; an error names the failing input by its number."""
    one, chance = target(name), random.Random(f"{seed} {name}")
    inputs = [path.read_bytes() for path in corpus(name)]
    for number in range(count):
        data = changed(inputs, chance)
        try:
            run_input(one, data)
        except BaseException:
            print(f"{name}: change {number} of seed {seed}: {data.hex()}", flush=True)
            raise


# With atheris


def has_atheris() -> bool:
    """Tell whether atheris can be imported."""
    return importlib.util.find_spec("atheris") is not None


def run_atheris(name: str, seconds: int, seed: int, count: int = 0) -> Figures | None:
    """Run a target by atheris for `seconds`; None if it has found a fault, which it has shown."""
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "tests.fuzz.led", name, str(folder), str(HERE / "corpus" / name)),
        *(f"-max_total_time={seconds}", f"-seed={seed}", f"-timeout={_TIMEOUT_S}"),
        *(f"-rss_limit_mb={_MEMORY_MIB}", f"-max_len={INPUT_MAX}", "-print_final_stats=1"),
        *(f"-artifact_prefix={folder.parent}/{name}-", "-verbosity=1"),
        *((f"-runs={count}",) if count else ()),
    ]
    began = time.monotonic()
    with (folder.parent / f"{name}.log").open("w+", errors="replace") as log:
        ended = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
        log.seek(0)
        said = log.read()
    if ended.returncode:
        print(said[-4000:], flush=True)
        return None
    executions = re.findall(r"stat::number_of_executed_units:\s*(\d+)", said)
    edges = re.findall(r"cov: (\d+)", said)
    return Figures(int(executions[-1]), int(edges[-1]), round(time.monotonic() - began))


# The corpus


def arcs(run: Callable[[], None]) -> set[Arc]:
    """Return the arcs between lines of our packages that `run` covers."""
    found: set[Arc] = set()
    prefixes = tuple(f"{ROOT}/{package}/" for package in _PACKAGES)

    def enter(frame: FrameType, _event: str, _argument: object) -> object:
        name = frame.f_code.co_filename
        if not name.startswith(prefixes):
            return None
        last = frame.f_lineno

        def line(inner: FrameType, event: str, _argument: object) -> object:
            nonlocal last
            if event == "line":
                found.add((name, last, inner.f_lineno))
                last = inner.f_lineno
            return line

        return line

    before = sys.gettrace()
    sys.settrace(enter)  # type: ignore[arg-type] # what typeshed knows as Any
    try:
        run()
    finally:
        sys.settrace(before)
    return found


def minimised(name: str) -> list[bytes]:
    """Return the seeds and the smallest inputs that cover all arcs, within CORPUS_MAX."""
    one = target(name)
    seeds = sorted(set(one.seeds()), key=_by_size)
    known = {
        path.read_bytes()
        for folder in (HERE / "corpus" / name, OUT / name)
        for path in _files(folder)
    } - set(seeds)
    covered: set[Arc] = set()
    kept: list[bytes] = []
    room = CORPUS_MAX
    for data in (*seeds, *sorted(known, key=_by_size)):
        new = arcs(partial(run_input, one, data))
        if len(data) <= room and (new - covered or data in seeds):
            covered |= new
            kept.append(data)
            room -= len(data)
    print(
        f"{name}: {len(kept)} of {len(known)} inputs, {CORPUS_MAX - room} bytes, "
        f"{len(covered)} arcs",
        flush=True,
    )
    return kept


def _by_size(data: bytes) -> tuple[int, bytes]:
    return len(data), data


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else iter(())


def write_corpus(name: str, inputs: Sequence[bytes]) -> None:
    """Make these inputs a target's corpus, each named by its hash."""
    folder = HERE / "corpus" / name
    folder.mkdir(parents=True, exist_ok=True)
    for path in _files(folder):
        path.unlink()
    for data in inputs:
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of the arguments; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="of atheris for each target (60)")
    parser.add_argument("--count", type=int, default=10_000, help="changes without it (10000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minimise", action="store_true", help="make the corpus anew")
    parser.add_argument("--input", type=Path, help="run this input alone")
    parser.add_argument("target", nargs="*", metavar="TARGET", choices=[*TARGETS, []])
    given = parser.parse_args(arguments)
    names = given.target or TARGETS
    if given.input:
        for name in names:
            run_input(target(name), given.input.read_bytes())
        return 0
    if given.minimise:
        for name in names:
            write_corpus(name, minimised(name))
        return 0
    if not has_atheris():
        print("fuzz: atheris is not installed (pip install atheris): random changes instead")
        for name in names:
            run_changes(name, given.count, given.seed)
            print(f"{name}: {given.count:,} changes of {len(corpus(name))} inputs: no finding")
        return 0
    status = 0
    for name in names:
        figures = run_atheris(name, given.seconds, given.seed)
        if figures is None:
            status = 1
            print(f"{name}: a finding, see {OUT}", flush=True)
        else:
            print(
                f"{name}: {figures.executions:,} executions, {figures.edges:,} edges, "
                f"{figures.seconds} s: no finding",
                flush=True,
            )
    return status


if __name__ == "__main__":
    sys.exit(main())
