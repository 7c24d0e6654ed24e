"""The manual page of vm.conf, and the examples, checked by the parser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.config.fake_host import FakeHost
from vmd.config.check import check
from vmd.config.disks import DiskKind, OnError
from vmd.config.host import FileText
from vmd.config.interfaces import INTERFACE_OWN_OPTIONS, SWITCH_OWN_OPTIONS
from vmd.config.lexer import RESERVED
from vmd.config.model import GuestClock
from vmd.config.parser import OWN_WORDS
from vmd.config.vms import DISK_OPTIONS, FIRMWARE_NAMES, FORMATS, OWN_OPTIONS, SHARE_OPTIONS

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "man" / "vm.conf.5"
EXAMPLES = sorted((ROOT / "examples").glob("*.conf"))

WITHOUT_MEANING = {"add", "id", "size"}
"""Reserved words that no statement has."""
KEYWORD_MACROS = {"Ic", "Cm"}
OTHER_MACROS = {"Ar", "Oo", "Oc", "Op", "Ns", "No", "Sy", "Li", "Pa", "It", "D1", "Fl"}
OTHER_OWN = {*OWN_WORDS, *("cpu", "key", "nat", "snapshot", "storage", "timeout", "to", "vms")}
"""Words of ours within other statements."""
VALUES = {"tap", "tcp", "udp", *FIRMWARE_NAMES, *FORMATS, *OnError, *GuestClock}
"""Words that are values, not keywords."""


def documented(text: str) -> set[str]:
    """Return the words that a page marks as keywords."""
    found = set()
    for line in text.splitlines():
        if not line.startswith("."):
            continue
        is_keyword = False
        for word in line.removeprefix(".").split():
            if word in KEYWORD_MACROS | OTHER_MACROS:
                is_keyword = word in KEYWORD_MACROS or (is_keyword and word == "Ns")
            elif is_keyword and re.fullmatch(r"[\w-]+", word):
                found.add(word)
    return found


def test_every_keyword_is_documented() -> None:
    """The page has the parser's keywords and values, and no others."""
    own = {*OWN_OPTIONS, *DISK_OPTIONS, *INTERFACE_OWN_OPTIONS, *SWITCH_OWN_OPTIONS, *OTHER_OWN}
    own |= {*SHARE_OPTIONS}
    known = (RESERVED - WITHOUT_MEANING) | own | VALUES
    assert documented(PAGE.read_text()) == known


def test_every_kind_of_disk_has_a_format() -> None:
    """Every kind of disk of `vmctl run -d` is a format of vm.conf."""
    assert set(FORMATS) == set(DiskKind) - {DiskKind.PROBE}


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
def test_the_page_is_well_formed() -> None:
    """Mandoc has no complaint, except about pages that are not installed."""
    done = subprocess.run(
        ["mandoc", "-T", "lint", PAGE], check=False, capture_output=True, text=True
    )
    lines = (done.stdout + done.stderr).splitlines()
    # Whether other pages are installed and indexed is not this page's fault.
    others = ("referenced manual not found", "outdated mandoc.db")
    assert [line for line in lines if not any(text in line for text in others)] == []


class AnyHost(FakeHost):
    """A host with every file, user and group of an example."""

    def read_file(self, path: str) -> FileText:
        """Read one of the files of the test, by the name at the end of its path."""
        return super().read_file(Path(path).name)

    def resolve(self, path: str) -> str:
        """Find anything."""
        return path

    def find_user(self, name: str) -> int | None:
        """Find anyone."""
        return len(name)

    find_group = find_user


def examples_of(page: str) -> list[str]:
    """Return the literal examples of the page."""
    return re.findall(r"\.Bd -literal.*?\n(.*?)\n\.Ed", page, re.DOTALL)


@pytest.mark.parametrize("text", examples_of(PAGE.read_text()))
def test_what_the_page_shows_is_right(text: str) -> None:
    """The parser accepts each example of the page."""
    lines, status = check("f", {}, host=AnyHost({"f": text.encode()}))
    assert (lines, status) == (["configuration OK"], 0)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_right(path: Path) -> None:
    """Each example file is accepted without a warning: as shipped, and with all its options."""
    assert check(str(path), {}) == (["configuration OK"], 0)
    text = path.read_text()
    offered = re.sub(r"^#(?! )", "", text, flags=re.MULTILINE)
    assert offered.count('\nvm "') > text.count('\nvm "')
    lines, status = check(path.name, {}, host=AnyHost({path.name: offered.encode()}))
    assert (lines, status) == (["configuration OK"], 0)


def test_there_are_examples() -> None:
    """The parametrised tests above compare something."""
    assert len(EXAMPLES) >= 2
    assert len(examples_of(PAGE.read_text())) >= 3
