"""List the programs' dependencies, and those that this system lacks, and bundle them.

    scripts/dependencies.py missing              # those that the interpreter running this lacks
    scripts/dependencies.py bundle DIR [NAME...] # download those (the missing ones) into DIR
    scripts/dependencies.py lock                 # lines of requirements.lock for all of them
    scripts/dependencies.py debian [DIR]         # Depends: of a Debian package with DIR bundled

pyproject.toml names the suitable versions; a bundle has the versions and hashes of
requirements.lock. Needs only Python, and pip and the network to bundle.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vmm_kvm.standard_streams import run_program  # noqa: E402 - found by the line above

PYTHON = (3, 11)


class Requirement(NamedTuple):
    """A package that the programs import."""

    name: str
    least: str
    """The oldest suitable version."""
    below: str | None
    """The first version that is too new."""

    @property
    def debian(self) -> str:
        """The name of Debian's package."""
        return f"python3-{self.name}"

    @property
    def debian_relations(self) -> list[str]:
        """The relations of a Debian package that depends on it."""
        relations = [f"{self.debian} (>= {self.least})"]
        if self.below:
            relations.append(f"{self.debian} (<< {self.below}~)")
        return relations

    def is_met_by(self, version: str) -> bool:
        """Tell whether a version is suitable."""
        given = _numbers(version)
        return _numbers(self.least) <= given and (
            self.below is None or given < _numbers(self.below)
        )

    def __str__(self) -> str:
        """Return it as users read it."""
        before = f", older than {self.below}" if self.below else " or newer"
        return f"{self.name} {self.least}{before}"


def requirements() -> list[Requirement]:
    """Return the dependencies that pyproject.toml names."""
    found = []
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        read = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<([\d.]+))?", text)
        if read is None:
            raise ValueError(f"pyproject.toml: cannot read the dependency {text}")
        found.append(Requirement(read[1], read[2], read[3]))
    return found


def missing() -> list[Requirement]:
    """Return those that the interpreter running this lacks, or has in an unsuitable version."""
    lacking = []
    for requirement in requirements():
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(requirement)
            continue
        if not requirement.is_met_by(version):
            lacking.append(requirement)
    return lacking


def bundled(directory: Path | None) -> set[str]:
    """Return the names of the packages that `directory` holds."""
    if directory is None:
        return set()
    return {_normal(path.name.partition("-")[0]) for path in directory.glob("*.dist-info")}


def bundle(directory: Path, names: set[str]) -> None:
    """Download packages and their dependencies, as locked, into `directory`.

    A dependency that pyproject.toml names itself is included only if it is among `names`.

    Raises:
        subprocess.CalledProcessError: pip failed, and has printed why.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(Path(scratch) / "pip", with_pip=True)
        lock = Path(scratch) / "lock"
        lock.write_text(locked(names))
        subprocess.run(
            [
                *(Path(scratch) / "pip/bin/python", "-m", "pip", "-q"),
                *("--disable-pip-version-check", "install", "--no-compile", "--no-deps"),
                *("--require-hashes", "--only-binary=:all:", "--upgrade"),
                *("--target", directory, "-r", lock),
            ],
            check=True,
        )
    # Keep only modules and their licences.
    for extra in (directory / "bin", *directory.glob("*/.*")):
        if extra.is_dir():
            shutil.rmtree(extra)


def locked(names: set[str]) -> str:
    """Return the lines of requirements.lock for `names` and their dependencies."""
    wanted = _closure(names)
    return "".join(text for name, text in _locked().items() if name in wanted)


def debian_depends(directory: Path | None) -> list[str]:
    """Return the relations of a Debian package that bundles the packages in `directory`."""
    own = bundled(directory)
    relations = [
        relation
        for requirement in requirements()
        if requirement.name not in own
        for relation in requirement.debian_relations
    ]
    # Compiled modules are for one version of Python.
    if directory is not None and any(directory.rglob("*.so")):
        major, minor = sys.version_info[:2]
        return [
            f"python3 (>= {major}.{minor}~)",
            f"python3 (<< {major}.{minor + 1}~)",
            *relations,
        ]
    return [f"python3 (>= {PYTHON[0]}.{PYTHON[1]}~)", *relations]


def _locked() -> dict[str, str]:
    """Return each package's lines of requirements.lock."""
    found: dict[str, str] = {}
    name = ""
    for line in (ROOT / "requirements.lock").read_text().splitlines(keepends=True):
        if read := re.match(r"([\w.-]+)==", line):
            name = _normal(read[1])
        found[name] = found.get(name, "") + line
    return found


def _closure(names: set[str]) -> set[str]:
    """Return `names` with their dependencies; the lock file tells which package needs which."""
    direct = {requirement.name for requirement in requirements()}
    reasons = {
        name: {_normal(word) for word in re.findall(r"#(?: +via)? +([\w.-]+)$", text, re.MULTILINE)}
        for name, text in _locked().items()
    }
    wanted = set(names)
    while True:
        more = {
            name for name, why in reasons.items() if name not in direct | wanted and why & wanted
        }
        if not more:
            return wanted
        wanted |= more


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with."""
    read = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in read[0].split(".")) if read else ()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _say_missing() -> int:
    lacking = missing()
    for requirement in lacking:
        print(f"missing: {requirement} (Debian: {requirement.debian})")
    return 1 if lacking else 0


def main(arguments: list[str]) -> int:
    """Run the command of the arguments; returns the exit status."""
    match arguments:
        case ["missing"]:
            return _say_missing()
        case ["bundle", directory, *names]:
            wanted = set(names) or {requirement.name for requirement in missing()}
            try:
                bundle(Path(directory), wanted)
            except subprocess.CalledProcessError as err:
                return int(err.returncode)
        case ["lock"]:
            print(locked({requirement.name for requirement in requirements()}), end="")
        case ["debian", *rest] if len(rest) <= 1:
            print(", ".join(debian_depends(Path(rest[0]) if rest else None)))
        case _:
            print((__doc__ or "").strip(), file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    run_program("dependencies", lambda: main(sys.argv[1:]))
