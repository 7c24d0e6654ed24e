"""Fuzz targets without atheris: the corpus, and some random changes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import harness
from tests.fuzz.inputs import Input, check_line

CHANGES = 40
ONE_CHANGE = (
    "import sys; sys.modules['atheris'] = None\n"
    "from tests.fuzz.harness import main\n"
    "sys.exit(main(['--count', '1', 'fw_cfg']))"
)


@pytest.fixture(scope="module", params=harness.TARGETS)
def name(request: pytest.FixtureRequest) -> str:
    """A target, imported."""
    name: str = request.param
    harness.target(name)
    return name


def test_the_corpus_holds(name: str) -> None:
    """No committed input is a finding."""
    one = harness.target(name)
    for path in harness.corpus(name):
        harness.run_input(one, path.read_bytes())


def test_changes_of_the_corpus_hold(name: str) -> None:
    """Some random changes of committed inputs are no findings."""
    harness.run_changes(name, CHANGES, seed=1)


def test_the_corpus_is_small(name: str) -> None:
    """A target's committed inputs stay below their limit."""
    sizes = [path.stat().st_size for path in harness.corpus(name)]
    assert 0 < sum(sizes) <= harness.CORPUS_MAX


def test_each_module_with_a_target_is_listed() -> None:
    """Each module with a target is in the list of targets."""
    modules = {path.stem for path in harness.HERE.glob("*.py") if "def run(" in path.read_text()}
    assert modules - {"harness"} == set(harness.TARGETS)
    assert sorted(path.name for path in (harness.HERE / "corpus").iterdir()) == [*harness.TARGETS]


def test_without_atheris() -> None:
    """Without atheris one line says so, and random changes are run."""
    ended = subprocess.run(
        [sys.executable, "-c", ONE_CHANGE],
        cwd=harness.ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    first, second = ended.stdout.splitlines()
    assert first == ("fuzz: atheris is not installed (pip install atheris): random changes instead")
    assert second.startswith("fw_cfg: 1 changes of ")


def test_an_input_has_no_end() -> None:
    """Numbers are little-endian; zeros follow the last byte."""
    given = Input(b"\x01\x02\x03")
    assert (given.number(2), given.choice("abcd"), given.is_over) == (0x201, "d", True)
    assert (given.number(8), given.piece(4), given.rest()) == (0, b"", b"")


@pytest.mark.parametrize("text", ["", "one\ntwo", "one\u2028two", "one\rtwo"])
def test_what_is_no_line(text: str) -> None:
    """An error without a text, or of several lines, is a finding."""
    check_line("one")
    with pytest.raises(AssertionError):
        check_line(text)


def test_a_descriptor_that_is_left_is_a_finding(tmp_path: Path) -> None:
    """A target that leaves a descriptor open has failed."""
    opened = []

    class Leaky:
        def run(self, data: bytes) -> None:
            opened.append((tmp_path / data.decode()).open("wb"))

        def seeds(self) -> list[bytes]:
            return []

    with pytest.raises(AssertionError, match="descriptors: "):
        harness.run_input(Leaky(), b"file")
    opened[0].close()


def test_the_corpus_is_what_covers_more() -> None:
    """Of inputs that cover the same lines the smallest is kept; seeds are always kept."""
    one = harness.target("fw_cfg")
    first = harness.arcs(lambda: one.run(one.seeds()[0]))
    again = harness.arcs(lambda: one.run(one.seeds()[0]))
    assert first == again
    assert first < harness.arcs(lambda: one.run(b"".join(one.seeds())))
