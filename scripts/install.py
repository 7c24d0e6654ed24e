"""Install the programs into a directory tree such as /usr/local, or uninstall them.

    scripts/install.py [--prefix /usr/local] [--destdir DIR] [--bundle DIR] [--uninstall]

The interpreter that runs this will run the programs. Modules go to `PREFIX/lib/vmm-kvm`, where no
other program finds them, with the packages of `--bundle` (see dependencies.py) beside them; the
commands in `PREFIX/bin` find them there. pyproject.toml lists packages, commands and the files of a
wheel; this script adds systemd's files. Units run the commands of this prefix.

`--destdir` is put before every path that is written to; no installed file mentions it. If a
dependency is missing, nothing is installed; `--no-check` leaves dependencies to a package manager.
"""

from __future__ import annotations

import argparse
import compileall
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import dependencies
from dependencies import run_program

ROOT = dependencies.ROOT
HOME = "lib/vmm-kvm"
BUNDLE = f"{HOME}/bundle"
# Files that a wheel does not bring, because only the system's service manager reads them.
SYSTEM_FILES = {
    "packaging/vmd.service": "lib/systemd/system/vmd.service",
    "packaging/vmd.socket": "lib/systemd/system/vmd.socket",
    "packaging/vmd.sysusers": "lib/sysusers.d/vmd.conf",
    "packaging/vmd.tmpfiles": "lib/tmpfiles.d/vmd.conf",
}
_COMMAND = """\
#!{python} -I
import sys

sys.path[:0] = {path}
from {module} import {function}

if __name__ == "__main__":
    sys.exit({function}())
"""
_SEARCHED = ("/usr", "/usr/local")
"""Prefixes below which systemd looks for its files, and man for pages."""


class File(NamedTuple):
    """A file to be installed."""

    place: str
    """Below the prefix."""
    content: bytes
    mode: int = 0o644


def files(prefix: str, python: str, bundle: Path | None) -> Iterator[File]:
    """Yield all files to install, except compiled modules."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, wheel = tables["project"], tables["tool"]["hatch"]["build"]["targets"]["wheel"]
    for package in wheel["packages"]:
        for path in _tree(ROOT / package):
            yield File(f"{HOME}/{path.relative_to(ROOT)}", path.read_bytes())
    for source, place in wheel["force-include"].items():
        yield File(f"{HOME}/{place}", (ROOT / source).read_bytes())
    # importlib.metadata reads the version here, as after an installation by pip.
    about = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    info = f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    yield File(f"{HOME}/{info}/METADATA", about.encode())
    path = [f"{prefix}/{HOME}"]
    if bundle is not None:
        path.append(f"{prefix}/{BUNDLE}")
        for found in _tree(bundle):
            mode = 0o755 if found.suffix == ".so" else 0o644
            yield File(f"{BUNDLE}/{found.relative_to(bundle)}", found.read_bytes(), mode)
    for name, entry in project["scripts"].items():
        module, _, function = entry.partition(":")
        text = _COMMAND.format(python=python, path=path, module=module, function=function)
        yield File(f"bin/{name}", text.encode(), 0o755)
    for source, place in {**wheel["shared-data"], **SYSTEM_FILES}.items():
        content = (ROOT / source).read_bytes()
        if place.endswith(".service"):
            content = for_prefix(content.decode(), prefix).encode()
        yield File(place, content)


def for_prefix(unit: str, prefix: str) -> str:
    """Return a unit that runs the commands of `prefix`."""
    return re.sub(
        r"^(Exec\w+=(?:.* )?-?)(?:/usr/bin/)?(vm\w+)\b",
        rf"\1{prefix}/bin/\2",
        unit,
        flags=re.MULTILINE,
    )


def _tree(top: Path) -> list[Path]:
    return sorted(
        path for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )


def install(found: list[File], top: Path, prefix: str, *, compiles: bool) -> None:
    """Write the files below `top`: the destination directory and the prefix."""
    shutil.rmtree(top / HOME, ignore_errors=True)  # an older version's modules
    for file in found:
        path = top / file.place
        path.parent.mkdir(parents=True, exist_ok=True)
        # Make a new file: running programs keep the old one.
        path.unlink(missing_ok=True)
        path.write_bytes(file.content)
        path.chmod(file.mode)
    if compiles:
        compileall.compile_dir(
            top / HOME, quiet=1, stripdir=str(top / HOME), prependdir=f"{prefix}/{HOME}"
        )


def uninstall(found: list[File], top: Path) -> None:
    """Remove the files, and directories that held nothing else."""
    shutil.rmtree(top / HOME, ignore_errors=True)
    for file in found:
        path = top / file.place
        path.unlink(missing_ok=True)
        for directory in path.relative_to(top).parents[:-1]:
            try:
                (top / directory).rmdir()
            except FileNotFoundError:
                continue
            except OSError:  # not empty
                break


def _is_ready(bundle: Path | None) -> bool:
    """Tell whether the programs would run; prints missing dependencies."""
    if sys.version_info[:2] < dependencies.PYTHON:
        needed = ".".join(map(str, dependencies.PYTHON))
        print(f"install: {sys.executable}: Python {needed} or newer is needed", file=sys.stderr)
        return False
    own = dependencies.bundled(bundle)
    lacking = [each for each in dependencies.missing() if each.name not in own]
    for each in lacking:
        print(f"install: missing: {each} (Debian: {each.debian})", file=sys.stderr)
    if lacking:
        print("install: install these, or let `make bundle` download them", file=sys.stderr)
    return not lacking


def _say_next(prefix: str) -> None:
    if prefix in _SEARCHED:
        print(
            "For the daemon, as root:\n"
            "    systemd-sysusers && systemd-tmpfiles --create vmd.conf\n"
            "    systemctl daemon-reload && systemctl enable --now vmd\n"
            "    usermod -aG vmd USER    # for each user who may speak with it"
        )
    else:
        print(f"systemd and man do not look below {prefix}: link to what they need from there.")


def main() -> int:
    """Install or uninstall; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prefix", default="/usr/local")
    parser.add_argument("--destdir", default="")
    parser.add_argument("--bundle", type=Path, help="packages to install beside the programs")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the commands")
    parser.add_argument("--no-compile", action="store_true", help="leave out compiled modules")
    parser.add_argument("--no-check", action="store_true", help="do not look for dependencies")
    parser.add_argument("--uninstall", action="store_true")
    options = parser.parse_args()
    prefix = options.prefix.rstrip("/")
    if not prefix.startswith("/"):
        parser.error(f"{options.prefix}: the prefix is an absolute path")
    bundle = options.bundle if options.bundle and options.bundle.is_dir() else None
    top = Path(f"{options.destdir}{prefix}")
    found = list(files(prefix, options.python, bundle))
    try:
        if options.uninstall:
            uninstall(found, top)
            return 0
        if not options.no_check and not _is_ready(bundle):
            return 1
        install(found, top, prefix, compiles=not options.no_compile)
    except OSError as err:
        print(f"install: {err.filename}: {err.strerror}", file=sys.stderr)
        return 1
    if not options.destdir:
        _say_next(prefix)
    return 0


if __name__ == "__main__":
    run_program("install", main)
