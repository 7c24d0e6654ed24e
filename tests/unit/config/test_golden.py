"""Golden files: every keyword and every text of vm.conf, as `vmd -nv` prints them.

`tests/config/pass-*.conf` are accepted and `fail-*.conf` are not; the file `.ok` beside each has
the expected output. A first line `# -D name=value` defines a macro. `VMD_GOLDEN=write` writes the
files from the current output: check them before you trust them.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

from tests.unit.config.fake_host import FakeHost, directory
from vmd.config.check import check, parse_macro
from vmd.config.interfaces import INTERFACE_OWN_OPTIONS, SWITCH_OWN_OPTIONS
from vmd.config.lexer import RESERVED
from vmd.config.vms import DISK_OPTIONS, FORMATS, OWN_OPTIONS

DIRECTORY = Path(__file__).resolve().parents[2] / "config"
SOURCES = Path(__file__).resolve().parents[3] / "vmd" / "config"
COMPLAINERS = ("report", "refuse", "refuse_value", "_report", "ValueRefusedError")
TOPICS = sorted(path.stem for path in DIRECTORY.glob("[pf]a[si][sl]-*.conf"))


def macros_of(text: str) -> dict[str, str]:
    """Return the macros of the first line."""
    words = text.partition("\n")[0].removeprefix("#").split()
    if words[:1] != ["-D"]:
        return {}
    macro = parse_macro(words[1])
    assert macro is not None
    return dict([macro])


@pytest.mark.parametrize("topic", TOPICS)
def test_golden(topic: str) -> None:
    """The output is that of the golden file, and the status says whether the file is accepted."""
    files = directory(DIRECTORY)
    name = f"{topic}.conf"
    macros = macros_of(files[name].decode())
    lines, status = check(name, macros, is_verbose=True, host=FakeHost(files))
    golden = DIRECTORY / f"{topic}.ok"
    if os.environ.get("VMD_GOLDEN") == "write":
        golden.write_text("".join(f"{line}\n" for line in lines))
    assert lines == golden.read_text().splitlines()
    assert status == (0 if topic.startswith("pass-") else 1)
    assert (lines[-1] == "configuration OK") == (status == 0)


def test_every_golden_file_is_read() -> None:
    """Every golden file belongs to a configuration."""
    assert {path.stem for path in DIRECTORY.glob("*.ok")} == set(TOPICS)
    others = {path.name for path in DIRECTORY.glob("*.conf") if path.stem not in TOPICS}
    assert {name for name in others if not name.startswith(("part-", "open-"))} == set()


def test_every_keyword_is_in_an_accepted_file() -> None:
    """Each keyword of OpenBSD's, except three without meaning, and each of ours occurs."""
    text = "".join(path.read_text() for path in sorted(DIRECTORY.glob("p*.conf")))
    words = set(re.findall(r"[\w-]+", text))
    assert RESERVED - {"add", "id", "size"} - words == set()
    own = {*OWN_OPTIONS, *DISK_OPTIONS, *INTERFACE_OWN_OPTIONS, *SWITCH_OWN_OPTIONS}
    assert {*own, *FORMATS} - words == set()


def test_every_text_is_in_a_golden_file() -> None:
    """Each message of the parser occurs in a golden file."""
    printed = "".join(path.read_text() for path in DIRECTORY.glob("*.ok"))
    missing = [text for text in complaints() if not re.search(text, printed)]
    assert missing == []


def complaints() -> list[str]:
    """Return the parser's messages, as patterns."""
    found = []
    for module in ("lexer", "grammar", "values", "interfaces", "vms", "parser"):
        tree = ast.parse((SOURCES / f"{module}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _called(node) in COMPLAINERS:
                found += [text for text in map(_pattern, node.args) if text is not None]
    assert len(found) > 40
    return found


def _called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _pattern(node: ast.expr) -> str | None:
    """Return the pattern of a literal; None for a variable, or if nothing is fixed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if not isinstance(node, ast.JoinedStr):
        return None
    parts = [
        re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*"
        for part in node.values
    ]
    return "".join(parts) if any(part != ".*" for part in parts) else None
