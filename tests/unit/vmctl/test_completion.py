"""Completion in bash: verbs, options and names of VMs, as they are."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from vmctl.verbs import OTHERS, VERBS

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "completions" / "vmctl.bash"
TABLE = "   ID   PID VCPUS  MAXMEM  CURMEM     TTY        OWNER    STATE NAME"


def complete(line: str) -> set[str]:
    """Return what bash offers for the last word of a line, with two VMs on the host."""
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
        ("vmctl wait --for s", {"stopped"}),
        ("vmctl log v", {"verbose"}),
        ("vmctl reset ", {"all", "switches", "vms"}),
        ("vmctl start -d /etc/passw", {"/etc/passwd", "/etc/passwd-"}),
        ("vmctl reload ", set()),
    ],
)
def test_completion(line: str, offered: set[str]) -> None:
    """What fits is offered, and nothing else."""
    assert {one for one in complete(line) if one != "/etc/passwd-"} == offered - {"/etc/passwd-"}


def test_completion_knows_every_verb_and_option() -> None:
    """The script lists the verbs and options of the command line."""
    assert complete("vmctl ") == {*VERBS, *OTHERS, "-v", "--help"}
    text = SCRIPT.read_text()
    for names, options in re.findall(r"^\t([a-z| ]+)\) options='(.*)' ;;$", text, re.MULTILINE):
        for name in names.split(" | "):
            verb = VERBS[name]
            assert set(options.split()) == {*verb.flags, *verb.values}
    listed = " | ".join(re.findall(r"^\t([a-z| ]+)\) options=", text, re.MULTILINE)).split(" | ")
    assert set(listed) == {name for name, verb in VERBS.items() if verb.flags or verb.values}
