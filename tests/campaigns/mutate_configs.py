"""Campaign: mutated vm.confs, as `vmd -nv` reads them.

The golden files of `tests/config` are the seeds. Each case takes one or two, breaks them (bytes,
words, lines, pieces of other files, numbers of extreme size, files that include each other), and
reads the result. The parser may accept it, or report faults, each in one line that a terminal can
show; never an exception. The time of a case is limited. An accepted file, written out and read
again, says the same.

Any deviation is printed, with the seed that repeats it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.unit.config.fake_host import FakeHost, directory  # noqa: E402 - after the path
from vmd.config.check import check  # noqa: E402
from vmd.config.lexer import RESERVED  # noqa: E402
from vmd.config.model import Config  # noqa: E402
from vmd.config.parser import parse_config  # noqa: E402
from vmd.config.text import config_lines  # noqa: E402
from vmd.config.vms import DISK_OPTIONS, FORMATS, OWN_OPTIONS  # noqa: E402

TIMEOUT_S = 5.0
NAME = "mutated.conf"
MACROS = {"fixed": "64M", "line": 'x"\n vm y { disable }\n', "loop": "$loop $fixed"}
WORDS = (
    *sorted({*RESERVED, *OWN_OPTIONS, *DISK_OPTIONS, *FORMATS}),
    *("{", "}", ",", "=", "(", "!", "#", "-", "$fixed", "$line", "$loop", "$undefined", '"', "'"),
    *("\\", "\\\n", "\n", "\t", "\0", "\1", "\2", "\xff", "\xc3\xa9", "\x1b[2J", "0", "-1"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775809", "1" * 5000),
    *("a" * 8095, "disk0.img", '"/vm/disk1.img"', "vmlinuz", "tap1", "br0", "64M", "alice:staff"),
    *("fe:e1:bb:d1:00:01", "10.0.0.0/8", '"fd00::/64"', '"\\\\"', f'include "{NAME}"\n'),
    *('include "part-vm.conf"\n', 'vm "x" {', 'switch "y" {'),
)


class HangError(BaseException):
    """A case takes too long."""


def mutated(seeds: Sequence[bytes], sound: Sequence[bytes], chance: random.Random) -> bytes:
    """Return one of the seeds, mostly of the sound ones among them, with one to eight faults."""
    data = bytearray(chance.choice(seeds if chance.random() < 0.3 else sound))
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(8):
            case 0 if data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            case 1:
                data[at:at] = _word(chance)
            case 2:  # a word replaced
                words = list(re.finditer(rb"\S+", data))
                if words:
                    word = chance.choice(words)
                    data[word.start() : word.end()] = _word(chance)
            case 3:  # a word removed
                words = list(re.finditer(rb"\S+\s*", data))
                if words:
                    word = chance.choice(words)
                    del data[word.start() : word.end()]
            case 4:
                lines = data.splitlines(keepends=True)
                if lines:
                    chance.choice((_drop, _double, _swap))(lines, chance)
                data = bytearray(b"".join(lines))
            case 5:
                other = chance.choice(seeds)
                start = chance.randrange(len(other) + 1)
                data[at:at] = other[start : start + chance.randrange(200)]
            case 6:
                del data[at:]
            case _:
                data[at : at + chance.randrange(20)] = b""
    return bytes(data)


def _word(chance: random.Random) -> bytes:
    word = chance.choice(WORDS).encode("latin-1")
    return chance.choice((b" ", b"", b"\n")) + word + chance.choice((b" ", b""))


def _drop(lines: list[bytearray], chance: random.Random) -> None:
    del lines[chance.randrange(len(lines))]


def _double(lines: list[bytearray], chance: random.Random) -> None:
    line = chance.choice(lines)
    lines.insert(chance.randrange(len(lines)), line)


def _swap(lines: list[bytearray], chance: random.Random) -> None:
    one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]


def plain(config: Config) -> Config:
    """Return a configuration without its places in files."""
    return config._replace(
        vms=tuple(vm._replace(where="") for vm in config.vms), warnings=(), includes=()
    )


def read(files: Mapping[str, bytes]) -> str:
    """Read a case as `vmd -nv` does; return the outcome."""
    lines, status = check(NAME, MACROS, is_verbose=True, host=FakeHost(files))
    for line in lines:
        if not line.replace("\t", "").isprintable():
            raise AssertionError(f"not a line: {line!r}")
    if status == 1:
        assert "configuration OK" not in lines
        assert any(line.startswith("vmd: ") for line in lines)
        return "refused"
    assert (status, lines[-1]) == (0, "configuration OK")
    config = parse_config(NAME, MACROS, host=FakeHost(files))
    text = "\n".join([*config_lines(config), ""]).encode("utf-8", "surrogateescape")
    again = parse_config(NAME, {}, host=FakeHost({NAME: text}))
    if plain(config) != plain(again):
        raise AssertionError(f"{config}\nreads again as\n{again}")
    return "accepted"


def _hang(_: int, __: FrameType | None) -> NoReturn:
    raise HangError


def run_case(files: Mapping[str, bytes], seed: int) -> tuple[str, str | None]:
    """Run one case; return the outcome, and the deviation, if there is one."""
    chance = random.Random(seed)
    seeds = [files[name] for name in sorted(files) if name.endswith(".conf")]
    sound = [files[name] for name in sorted(files) if re.fullmatch(r"pass-.*\.conf", name)]
    case = {**files, NAME: mutated(seeds, sound, chance)}
    old = signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT_S)
    try:
        return read(case), None
    except HangError:
        return "deviates", f"seed {seed}: more than {TIMEOUT_S} s\n{traceback.format_exc()}"
    except Exception:  # noqa: BLE001 - whatever it is, it must not be
        return "deviates", f"seed {seed}: {traceback.format_exc()}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="how many files")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    files = directory(ROOT / "tests" / "config")
    started = time.monotonic()
    counts: Counter[str] = Counter()
    for seed in range(options.seed, options.seed + options.count):
        outcome, deviation = run_case(files, seed)
        counts[outcome] += 1
        if deviation:
            print(deviation)
    took = time.monotonic() - started
    outcomes = ", ".join(f"{counts[name]} {name}" for name in ("accepted", "refused"))
    print(f"{options.count} files in {took:.0f} s: {outcomes}, {counts['deviates']} deviations")
    return 1 if counts["deviates"] else 0


if __name__ == "__main__":
    sys.exit(main())
