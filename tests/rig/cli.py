"""`rig run`: run a command under a full KVM host, on any machine.

The rig sees this machine's whole file system read-only with a scratch layer on top. Files that the
command writes under $RIG_OUT come back in --out DIR; all other changes are lost. $RIG names the
rig's clock there: plain or counted.
The exit status is the command's; 124 is a time-out, 125 a rig that did not come up.

--icount runs one processor whose clock counts instructions instead of time. Two runs of the same
work then agree to within about one per cent, however busy the machine is, which makes ratios
between two programs repeatable. That holds for work that waits for nothing outside: the file
system comes over 9p, every wait for it makes that clock jump, and so does every failed look-up of
a Python import. Copy the files that a benchmark reads into memory first (--stage PATH for a
directory, with patterns to leave out, or a file; --project for this repository, its virtual
environment and its interpreter) and run everything once before measuring. Disk and network work is
too slow under --icount (minutes a megabyte): measure it on the plain clock, two programs in turn,
medians of several rounds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests import artifacts
from tests.rig.machine import EXIT_NOT_UP, Rig, Stage, project_stages

ROOT = Path(__file__).resolve().parents[2]


def parse(arguments: Sequence[str]) -> Rig:
    """Read the command line; a wrong one ends the process with status 2 and a usage line."""
    parser = argparse.ArgumentParser(
        prog="rig", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True, metavar="run")
    run = verbs.add_parser(
        "run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run.add_argument("--icount", action="store_true", help="instruction-counting clock, one CPU")
    run.add_argument(
        "--copy-words",
        action="store_true",
        help="processors without ERMS and FSRM, so that copies cost a tenth: for disks",
    )
    run.add_argument("--cpus", type=int, default=2)
    run.add_argument("--mem", type=int, default=6144, help="MiB")
    run.add_argument("--timeout", type=float, default=900, help="seconds")
    run.add_argument(
        "--stage",
        action="append",
        default=[],
        metavar="PATH[:PATTERN,...]",
        help="copy a directory or file into memory first",
    )
    run.add_argument(
        "--project", action="store_true", help="stage what a run of this project's code reads"
    )
    run.add_argument("--out", type=Path, help="where files from $RIG_OUT are copied")
    run.add_argument("command", nargs="+")
    given = parser.parse_args(arguments)
    stages = tuple(Stage.parse(text) for text in given.stage)
    if given.project:
        stages = project_stages(ROOT) + stages
    return Rig(
        command=tuple(given.command),
        cpus=given.cpus,
        memory=given.mem << 20,
        timeout_s=given.timeout,
        is_counted=given.icount,
        copies_words=given.copy_words,
        stages=stages,
        out=given.out,
    )


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    try:
        return parse(arguments).run()
    except (artifacts.ArtifactError, OSError, subprocess.CalledProcessError) as error:
        print(f"rig: {error}", file=sys.stderr)
        return EXIT_NOT_UP
