"""The command line itself: verbs, prefixes, misuse, the manual, and what it imports."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from vmctl.cli import app, main

ROOT = Path(__file__).resolve().parents[2]
MANUAL = (ROOT / "man" / "vmctl.8").read_text()
USAGE = "usage:\tvmctl [-v] command [arg ...]\n"


def loaded_modules(*arguments: str) -> set[str]:
    """Run vmctl in an interpreter of its own; return the top-level modules that it loaded."""
    program = (
        "import sys\nfrom vmctl.cli import main\n"
        f"try: main({list(arguments)!r})\nexcept SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], USAGE),
        (["frobnicate"], "unknown argument: frobnicate\n" + USAGE),
        (["-x"], "vmctl: no such option: -x\n" + USAGE),
        (["run", "-Z"], "vmctl: no such option: -Z\n" + USAGE),
        (["run", "-m"], "vmctl: option '-m' requires an argument\n" + USAGE),
        (["doctor", "extra"], "vmctl: got unexpected extra argument(s) (extra)\n" + USAGE),
    ],
)
def test_misuse(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Misuse is status 1 with OpenBSD's texts, on standard error alone."""
    assert main(arguments) == 1
    assert ("", error) == tuple(capsys.readouterr())


def test_unique_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    """A verb may be shortened to any unique prefix."""
    assert main(["doc", "--help"]) == 0
    assert "can run VMs" in capsys.readouterr().out


def test_manual_has_every_verb_and_option() -> None:
    """The manual and the command line name the same verbs and options."""
    group = typer.main.get_command(app)
    verbs = getattr(group, "commands", {})
    documented = set(re.findall(r"^\.It (?:Xo )?Cm (\w+)", MANUAL, re.MULTILINE))
    assert documented == set(verbs)
    for verb in verbs.values():
        for parameter in verb.params:
            for option in parameter.opts:
                if option in {"-h", "--help"} or not option.startswith("-"):
                    continue
                assert f"Fl {option[1:]}" in MANUAL, option


def test_help_is_light() -> None:
    """Help loads neither the hypervisor nor rich."""
    modules = loaded_modules("run", "--help")
    assert "vmctl.cli" in modules
    assert not {name for name in modules if name.split(".")[0] in {"vmm_kvm", "rich", "asyncio"}}


def test_run_is_light() -> None:
    """A run loads no codec that its kernel does not need, no rich, no asyncio, no pyroute2."""
    modules = loaded_modules("run", "-b", "/nonexistent")
    assert "vmm_kvm.machine" in modules
    heavy = {"rich", "asyncio", "zstandard", "lz4", "pyroute2", "msgspec", "json"}
    assert not {name for name in modules if name.split(".")[0] in heavy}


def test_a_reader_that_goes_away_is_no_error_of_ours() -> None:
    """What `vmctl ... | head -0` leaves unread ends quietly, by any way to read words."""
    program = (
        "import os, sys\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
        "import vmctl.__main__ as command\n{patch}\ncommand.main()"
    )
    by_typer = "sys.argv = ['vmctl', 'doctor', '--json']"
    plainly = "command._perform = lambda _arguments: print('text') or 0"
    for patch in (by_typer, plainly):
        words = [sys.executable, "-c", program.format(patch=patch)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
        assert (done.returncode, done.stderr) == (1, "")
