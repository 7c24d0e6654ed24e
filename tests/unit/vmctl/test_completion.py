"""Completion in bash, zsh and fish: verbs, options and names of VMs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.completions import FILES
from vmctl.line.verbs import VERBS, names

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "completions" / "vmctl.bash"
TABLE = "   ID   PID VCPUS  MAXMEM  CURMEM     TTY        OWNER    STATE NAME"


def complete(line: str) -> set[str]:
    """Return bash's offers for the last word of a line, with two VMs on the host."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    program = f"""
        vmctl() {{ printf '%s\\n' '{TABLE}' '1 - 1 1 - - root stopped web' \\
            '2 - 1 1 - - root stopped whale'; }}
        compopt() {{ :; }}
        . {SCRIPT}
        COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1}
        _vmctl
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("vmctl sta", {"start", "status"}),
        ("vmctl -v unp", {"unpause"}),
        ("vmctl stop w", {"web", "whale"}),
        ("vmctl stop -f we", {"web"}),
        ("vmctl sto we", {"web"}),
        ("vmctl console ", {"web", "whale"}),
        ("vmctl start -t wh", {"whale"}),
        ("vmctl start -B c", {"cdrom"}),
        ("vmctl start --fir", {"--firmware"}),
        ("vmctl run --ti", {"--timeout"}),
        ("vmctl run --firmware u", {"uefi"}),
        ("vmctl ru -B d", {"disk"}),
        ("vmctl run -i b", {"bridge:"}),
        ("vmctl create -", {"-b", "-i", "-s", "--help"}),
        ("vmctl cr /etc/passw", {"/etc/passwd", "/etc/passwd-"}),
        (
            "vmctl image ",
            {"check", "info", "list", "prune", "pull", "resize", "rm", "--help"},
        ),
        ("vmctl image info --j", {"--json"}),
        ("vmctl im inf /etc/passw", {"/etc/passwd", "/etc/passwd-"}),
        ("vmctl doctor --", {"--json", "--help"}),
        ("vmctl help im", {"image"}),
        ("vmctl w we", {"web"}),
        ("vmctl res v", {"vms"}),
        ("vmctl wait --for s", {"stopped"}),
        ("vmctl log v", {"verbose"}),
        ("vmctl reset ", {"all", "switches", "vms"}),
        ("vmctl start -d /etc/passw", {"/etc/passwd", "/etc/passwd-"}),
        ("vmctl reload ", set()),
    ],
)
def test_completion(line: str, offered: set[str]) -> None:
    """All fitting words are offered, and no others."""
    assert {one for one in complete(line) if one != "/etc/passwd-"} == offered - {"/etc/passwd-"}


def test_completion_knows_every_verb_and_option() -> None:
    """All verbs are offered, and every option of each."""
    assert complete("vmctl ") == {*names(), "-H", "-v", "--help", "--version"}
    for name, verb in VERBS.items():
        options = {option.name for option in verb.taken}
        assert complete(f"vmctl {name} -") == {*options, "--help"}


@pytest.mark.parametrize("name", FILES)
def test_completions_are_made_of_the_table(name: str) -> None:
    """The files in completions/ equal the output of scripts/completions.py."""
    made = (ROOT / "completions" / name).read_text()
    assert made == FILES[name](), "run python scripts/completions.py"


@pytest.mark.parametrize(
    ("shell", "name"), [("bash", "vmctl.bash"), ("zsh", "_vmctl"), ("fish", "vmctl.fish")]
)
def test_completions_are_no_syntax_error(shell: str, name: str) -> None:
    """The shell reads its script without a complaint."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    words = [shell, "-n", str(ROOT / "completions" / name)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("vmctl sta", {"start", "status"}),
        ("vmctl start --app", {"--append"}),
        ("vmctl run -B c", {"cdrom"}),
        ("vmctl image i", {"info"}),
        ("vmctl stop we", {"web"}),
        ("vmctl doctor --js", {"--json"}),
    ],
)
def test_fish_completes(line: str, offered: set[str], tmp_path: Path) -> None:
    """Fish offers the fitting words."""
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    program = tmp_path / "vmctl"
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{TABLE}' '1 - 1 1 - - root stopped web'\n")
    program.chmod(0o755)
    script = ROOT / "completions" / "vmctl.fish"
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source {script}; complete -C '{line}'"],
        capture_output=True,
        text=True,
        check=True,
        env={"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    assert {word.partition("\t")[0] for word in done.stdout.splitlines()} == offered
