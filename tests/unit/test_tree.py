"""Conventions of the whole tree that no linter knows: contents and sizes of files."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE_LINES_MAX = 600
# A test module may hold every case of one thing.
TEST_LINES_MAX = 800

# Each is written with a gap, so that this file does not hold it either.
OPEN_ENDS = tuple(
    word.replace("-", "") for word in ("TO-DO", "FIX-ME", "XX-X:", "HA-CK:", "NotImplemented-Error")
)
REGISTRY_HOSTS = tuple(
    name.replace(" ", ".")
    for name in (
        *("pypi org", "pythonhosted org", "deb.debian org", "snapshot.debian org"),
        *("security.debian org", "archive.ubuntu com", "crates io", "npmjs org", "npmjs com"),
        *("proxy.golang org", "conda.anaconda org", "docker io"),
    )
)
# Lists of register names, tables of structures: a table may be as long as its subject.
TABLES = ("vmm_kvm/kvm/abi.py",)
# Released by others, with the hashes that docs/web.md has.
VENDORED = ROOT / "vmctl" / "web" / "page" / "xterm"
# The agent is copied into guests as one file.
WHOLE = ("vmm_agent/agent.py",)


def _tracked() -> list[Path]:
    """Return the files of this tree: those that git tracks or would add, and that exist."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = (ROOT / name for name in listed.split("\0") if name)
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


def _lines() -> Iterator[tuple[str, int, str]]:
    for path in _tracked():
        if VENDORED in path.parents:
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:  # an image
            continue
        name = str(path.relative_to(ROOT))
        yield from ((name, number, line) for number, line in enumerate(text.splitlines(), 1))


def _with(words: tuple[str, ...]) -> list[str]:
    wanted = re.compile("|".join(rf"(?<!\w){re.escape(word)}" for word in words))
    return [f"{name}:{number}: {line}" for name, number, line in _lines() if wanted.search(line)]


def _python_files() -> list[Path]:
    return [path for path in _tracked() if path.suffix == ".py"]


def test_nothing_is_left_open() -> None:
    """No file holds a mark of unfinished work."""
    assert _with(OPEN_ENDS) == []


def test_no_file_names_a_package_registry() -> None:
    """No file names a package registry: the machine's pip and apt know their mirrors."""
    assert _with(REGISTRY_HOSTS) == []


def test_the_lock_file_has_hashes_and_no_hosts() -> None:
    """Every locked package has an exact version and a SHA-256 hash, and no address."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith((" ", "#"))]
    assert "://" not in text
    assert [line for line in lines if line.startswith("-")] == []
    assert [line for line in lines if "==" not in line or "--hash=sha256:" not in line] == []


def test_the_lock_file_covers_the_project() -> None:
    """Every direct and development dependency is in the lock file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    wanted += project["project"]["optional-dependencies"]["web"]
    names = {re.split(r"[<>=!~ ;\[]", requirement)[0].lower() for requirement in wanted}
    text = (ROOT / "requirements.lock").read_text()
    locked = {name.lower() for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}
    assert names - locked == set()


def test_modules_are_small() -> None:
    """A module has at most 600 lines; one of tests 800."""
    large = set()
    for path in _python_files():
        name = str(path.relative_to(ROOT))
        limit = TEST_LINES_MAX if name.startswith("tests/") else MODULE_LINES_MAX
        if len(path.read_text().splitlines()) > limit:
            large.add(name)
    assert large - {*TABLES, *WHOLE} == set()


def test_every_test_says_what_it_shows() -> None:
    """Each test function has a docstring of its own."""
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and ast.get_docstring(node) is None
    ]
    assert silent == []


def test_unit_tests_neither_sleep_nor_mock() -> None:
    """No unit test waits for time, or replaces the code that it tests."""
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "tests" / "unit").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _names_used(node)
        if name == "time.sleep" or name.startswith("unittest.mock")
    ]
    assert wrong == []


def _names_used(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return [f"{node.value.id}.{node.attr}"]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


@pytest.mark.parametrize("script", ["scripts/setup.sh", "tests/rig/rig", ".ci/run"])
def test_shell_scripts_parse(script: str) -> None:
    """The scripts of a fresh machine are POSIX shell without syntax errors, and executable."""
    path = ROOT / script
    parsed = subprocess.run(["/bin/sh", "-n", path], check=False, capture_output=True, text=True)
    assert parsed.stderr == ""
    assert path.stat().st_mode & 0o111 == 0o111
