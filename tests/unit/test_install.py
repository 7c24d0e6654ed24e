"""The files and places of `make install`, and their removal; the tables of packagers agree."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALL = ROOT / "scripts" / "install.py"
DEPENDENCIES = ROOT / "scripts" / "dependencies.py"
UNITS = ("lib/systemd/system/vmd.service", "share/systemd/user/vmd.service")


def _install(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-B", INSTALL, *arguments], check=False, capture_output=True, text=True
    )


def _files(top: Path) -> set[str]:
    return {str(path.relative_to(top)) for path in top.rglob("*") if not path.is_dir()}


def _project() -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())[
        "project"
    ]
    return table


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Return the prefix of an installation."""
    done = _install("--prefix", str(tmp_path / "prefix"), "--no-compile")
    assert (done.returncode, done.stderr) == (0, "")
    return tmp_path / "prefix"


def test_what_is_installed(prefix: Path) -> None:
    """Commands, pages, completions, units, users, examples and the self-test guest are there."""
    expected = {
        *(f"bin/{name}" for name in _project()["scripts"]),
        *(f"share/man/man{page.suffix[1:]}/{page.name}" for page in (ROOT / "man").iterdir()),
        *(f"share/doc/vmm-kvm/examples/{path.name}" for path in (ROOT / "examples").iterdir()),
        *("share/bash-completion/completions/vmctl", "share/zsh/site-functions/_vmctl"),
        *("share/fish/vendor_completions.d/vmctl.fish", "lib/vmm-kvm/vmm_kvm/bios/selftest.bin"),
        *("lib/systemd/system/vmd.socket", "share/systemd/user/vmd.socket", *UNITS),
        *("lib/sysusers.d/vmd.conf", "lib/tmpfiles.d/vmd.conf"),
        *("share/vmm-kvm/vmm-agent", "share/vmm-kvm/vmm-agent.service"),
    }
    assert expected - _files(prefix) == set()


def test_each_completion_and_page_is_in_the_wheel() -> None:
    """Each completion and page in the tree is in the wheel's list."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    there = set(wheel["targets"]["wheel"]["shared-data"])
    folders = ("man", "completions", "examples", "packaging/user")
    here = {f"{folder}/{path.name}" for folder in folders for path in (ROOT / folder).iterdir()}
    assert there == here | {"vmm_agent/agent.py", "vmm_agent/vmm-agent.service"}


def test_the_commands_run(prefix: Path, tmp_path: Path) -> None:
    """The commands find their modules, from any directory, and with any PYTHONPATH."""
    (tmp_path / "vm.conf").write_text("")
    done = subprocess.run(
        [prefix / "bin" / "vmd", "-n", "-f", tmp_path / "vm.conf"],
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        env={"PYTHONPATH": "/nonexistent", "HOME": "/nonexistent"},
    )
    assert (done.returncode, done.stderr) == (0, "configuration OK\n")


@pytest.mark.parametrize("unit", UNITS)
def test_units_run_the_commands_of_their_prefix(prefix: Path, unit: str) -> None:
    """A unit runs no command of another installation."""
    commands = re.findall(
        r"^Exec\w+=(?:.* )?-?(\S*vm\S*)", (prefix / unit).read_text(), re.MULTILINE
    )
    assert commands == [f"{prefix}/bin/vmd", f"{prefix}/bin/vmctl"]


def test_a_staged_installation_names_its_final_place(tmp_path: Path) -> None:
    """No installed file contains DESTDIR."""
    done = _install("--destdir", str(tmp_path), "--prefix", "/usr", "--python", "/usr/bin/python3")
    assert (done.returncode, done.stdout) == (0, "")
    top = tmp_path / "usr"
    assert (top / "bin" / "vmd").read_text().startswith("#!/usr/bin/python3 -I\n")
    wrong = [name for name in _files(top) if str(tmp_path).encode() in (top / name).read_bytes()]
    assert wrong == []


def test_nothing_is_left(prefix: Path) -> None:
    """Installed files can be removed, and foreign files beside them stay."""
    (prefix / "share" / "man" / "man8" / "other.8").write_text("")
    done = _install("--prefix", str(prefix), "--uninstall")
    assert (done.returncode, done.stderr) == (0, "")
    assert _files(prefix) == {"share/man/man8/other.8"}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    """Without the dependencies nothing is installed; each is named with its Debian package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    done = _install("--prefix", str(tmp_path / "to"), python=f"{tmp_path}/bare/bin/python")
    assert done.returncode == 1
    assert re.findall(r"missing: ([\w-]+) .*\(Debian: ([\w-]+)\)", done.stderr) == [
        (name, f"python3-{name}") for name in _names()
    ]
    assert not (tmp_path / "to").exists()


def test_a_bundle_is_found(tmp_path: Path) -> None:
    """Packages in a bundle are not missing, and the commands look for them there."""
    bundle = tmp_path / "bundle"
    for name in _names():
        (bundle / f"{name}-1.dist-info").mkdir(parents=True)
    (bundle / "extra.py").write_text("")
    done = _install("--prefix", str(tmp_path / "to"), "--bundle", str(bundle))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "to/lib/vmm-kvm/bundle/extra.py").exists()
    assert f"'{tmp_path}/to/lib/vmm-kvm/bundle'" in (tmp_path / "to/bin/vmd").read_text()


def test_a_bundle_needs_no_package_of_debians(tmp_path: Path) -> None:
    """The Debian package depends only on packages that it does not bundle."""
    (tmp_path / "msgspec-1.dist-info").mkdir()
    done = subprocess.run(
        [sys.executable, "-B", DEPENDENCIES, "debian", tmp_path],
        check=True,
        capture_output=True,
        text=True,
    )
    names = {relation.split()[0] for relation in done.stdout.split(", ")}
    assert names == {"python3", *(f"python3-{name}" for name in _names() if name != "msgspec")}


def test_the_debian_package_has_the_projects_version() -> None:
    """The Debian changelog begins with the project's version."""
    changelog = (ROOT / "packaging" / "debian" / "changelog").read_text()
    assert changelog.startswith(f"vmm-kvm ({_project()['version']}) ")


def _names() -> list[str]:
    return [re.split("[<>=]", text)[0] for text in _project()["dependencies"]]
