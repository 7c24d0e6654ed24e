"""A Debian system in a directory, like a fresh machine, with all that our installation needs.

mmdebstrap makes it once, with the packages that build and run ours. Beside it lie the packages that
ours depends on, not installed, so that apt installs them without a network. It is kept in the cache
of `tests.artifacts`; it takes some minutes, the network and root to make.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.artifacts import cache_dir

ROOT = Path(__file__).resolve().parents[2]
SUITES = ("trixie", "bookworm", "testing")
_PACKAGES = (
    *(
        "systemd-sysv",
        "dbus",
        "libpam-systemd",
        "iproute2",
        "procps",
        "nftables",
        "passwd",
        "mount",
        "man-db",
    ),
    *("build-essential", "debhelper", "dh-python", "git", "make"),
    *("python3", "python3-venv", "pipx", "ca-certificates"),
)
_DEPENDENCIES = ("lz4", "msgspec", "pyroute2", "rich", "typer", "zstandard")
# The package bundles dependencies that a release lacks.
_FETCH = """
set -eu
cp /etc/resolv.conf etc/resolv.conf
mount --bind /proc proc
chroot . apt-get -qq update
for name; do
    chroot . apt-get -qq -y --no-install-recommends --download-only install "python3-$name" || :
done
"""


def debian_tree(suite: str) -> Path:
    """Return the system, made at the first call with this recipe.

    Raises:
        subprocess.CalledProcessError: it cannot be made, without root or the network for one.
    """
    recipe = hashlib.sha256(repr((_PACKAGES, _DEPENDENCIES, _FETCH)).encode()).hexdigest()[:12]
    place = cache_dir() / "trees" / f"packages-{suite}-{recipe}"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(".part")
        subprocess.run(["rm", "-rf", "--one-file-system", part], check=True)
        command = [
            *("mmdebstrap", "--quiet", "--mode=root", "--variant=apt"),
            # The index of a mirror may be older than its validity.
            *('--aptopt=Acquire::Check-Valid-Until "false"', "--aptopt=Acquire::Retries 3"),
            *(f"--include={','.join(_PACKAGES)}", suite, str(part), *sources(suite)),
        ]
        subprocess.run(command, check=True)
        subprocess.run(
            ["unshare", "--mount", "sh", "-c", _FETCH, "fetch", *_DEPENDENCIES],
            cwd=part,
            check=True,
        )
        part.rename(place)
    return place


def sources(suite: str) -> list[str]:
    """Return apt's line for this machine's mirror; without one mmdebstrap uses its own."""
    ask = """
    . scripts/apt_sources.sh
    debian_source "$(. /etc/os-release; echo "${VERSION_CODENAME:-}")" | head -n 1 | cut -f 1
    """
    done = subprocess.run(
        ["sh", "-euc", ask], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    return [f"deb {done} {suite} main"] if done else []


def wheels(python: str) -> Path:
    """Return a folder of pip's packages for an interpreter such as `3.13`, without a network."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    # pipx first updates pip.
    tools = [*project["build-system"]["requires"], "pip>=23.1"]
    lock = subprocess.run(
        [sys.executable, ROOT / "scripts" / "dependencies.py", "lock"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    recipe = hashlib.sha256(repr((python, tools, lock)).encode()).hexdigest()[:12]
    place = cache_dir() / f"wheels-{recipe}"
    if not place.exists():
        part = place.with_suffix(".part")
        part.mkdir(exist_ok=True)
        (part / "lock").write_text(lock)
        _download(python, part, *tools)
        _download(python, part, "--no-deps", "--require-hashes", "-r", f"{part}/lock")
        part.rename(place)
    return place


def _download(python: str, place: Path, *wanted: str) -> None:
    platforms = ("manylinux2014_x86_64", "manylinux_2_28_x86_64", "any")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "download"),
            *("--only-binary=:all:", "--python-version", python, "--dest", place),
            *(word for name in platforms for word in ("--platform", name)),
            *wanted,
        ],
        check=True,
    )
