"""The recipes of docs/ci.md: shell that parses, commands and options that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmctl.line.cli import read

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "ci.md").read_text()


def _scripts() -> Iterator[str]:
    """Yield each script of the page: of a block of shell, and of steps in YAML."""
    for kind, block in re.findall(r"^```(sh|yaml)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        if kind == "sh":
            yield block
            continue
        for found in re.finditer(r"^( +)run: \|\n((?:\1  .*\n)+)", block, re.MULTILINE):
            yield textwrap.dedent(found[2])
        for found in re.finditer(r"^  script:\n((?:    - .*\n)+)", block, re.MULTILINE):
            yield found[1].replace("    - ", "")


SCRIPTS = tuple(_scripts())


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script: str) -> None:
    """A shell finds no error in them."""
    done = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_commands_exist() -> None:
    """Each command line of vmctl is one, and each option of pytest's is the plugin's."""
    plugin = (ROOT / "vmm_pytest" / "plugin.py").read_text()
    verbs = set()
    for script in SCRIPTS:
        for line in script.replace("\\\n", " ").splitlines():
            words = shlex.split(re.split(r"\|\||<|>", line)[0], comments=True)
            if words[:1] == ["vmctl"]:
                verbs.add(read(words[1:]).verb.name)
            if words[:1] == ["pytest"]:
                options = [word.partition("=")[0] for word in words if word.startswith("--vm-")]
                assert options
                assert [one for one in options if f'"{one}"' not in plugin] == []
    assert {"doctor", "run", "start", "stop", "image pull", "-H"} <= verbs


def test_the_extra_exists() -> None:
    """The recipes name extras, a plugin and a program that the project has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in re.findall(r"vmm-kvm\[(\w+)\]", PAGE):
        assert name in project["optional-dependencies"]
    assert project["entry-points"]["pytest11"] == {"vmm": "vmm_pytest.plugin"}
    assert "autopkgtest-virt-vmm" in project["scripts"]
