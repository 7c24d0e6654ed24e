"""Build the Debian package for the release of Debian that this runs on, into dist/.

    scripts/deb.py [--bundle NAME]...

build/deb/vmm-kvm gets the files that git tracks, and packaging/debian as its debian directory. The
package depends on Debian's packages of the dependencies where the release has them; the others, and
those named with --bundle, are downloaded as locked and bundled. Then dpkg-buildpackage -b runs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dependencies
from dependencies import ROOT, Requirement, run_program
from project_files import copy_files

BUILD = ROOT / "build" / "deb"
TREE = BUILD / "vmm-kvm"
OUT = ROOT / "dist"


class BuildError(Exception):
    """The package cannot be built; `str()` is one line."""


def candidate(package: str) -> str | None:
    """Return the version of a package that apt would install, if it knows one."""
    done = subprocess.run(
        ["apt-cache", "policy", package], check=True, capture_output=True, text=True
    )
    found = re.search(r"Candidate: (?:\d+:)?(\d\S*)", done.stdout)
    return found[1] if found else None


def lacking() -> list[Requirement]:
    """Return the requirements that this release lacks, or has in an unsuitable version."""
    if candidate("python3") is None:
        raise BuildError("apt knows no packages: run apt-get update")
    found = []
    for requirement in dependencies.requirements():
        version = candidate(requirement.debian)
        if version is None or not requirement.is_met_by(version):
            found.append(requirement)
    return found


def make_tree() -> None:
    """Copy the project's files."""
    shutil.rmtree(BUILD, ignore_errors=True)
    copy_files(TREE)
    shutil.copytree(TREE / "packaging" / "debian", TREE / "debian")


def build() -> list[Path]:
    """Build the package in the tree; returns the packages, in `OUT`."""
    subprocess.run(
        ["dpkg-buildpackage", "-b", "-us", "-uc"],
        cwd=TREE,
        env={**os.environ, "DEB_BUILD_OPTIONS": "noautodbgsym"},  # we have no C code
        check=True,
    )
    OUT.mkdir(exist_ok=True)
    return [Path(shutil.copy2(path, OUT)) for path in sorted(BUILD.glob("*.deb"))]


def main() -> int:
    """Do what the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", action="append", default=[], help="bring this package along")
    options = parser.parse_args()
    try:
        names = {*options.bundle, *(each.name for each in lacking())}
        make_tree()
        if names:
            print(f"deb: bundled: {', '.join(sorted(names))}", flush=True)
            dependencies.bundle(TREE / "debian" / "bundle", names)
        for path in build():
            print(path.relative_to(ROOT))
    except BuildError as err:
        print(f"deb: {err}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as err:
        print(f"deb: {err.cmd[0]} failed", file=sys.stderr)
        return 1
    except FileNotFoundError as err:
        print(f"deb: {err.filename}: {err.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_program("deb", main)
