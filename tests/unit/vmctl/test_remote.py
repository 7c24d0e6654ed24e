"""`vmctl -H`: what runs at the other host. ssh is a script, which runs it here by a shell."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.vmctl_driver import VMCTL, ConsoleProcess
from vmctl.client import CommandError
from vmctl.line.cli import UsageError, read
from vmctl.line.remote import command_for

# The words in front of "--" are ssh's, behind it are the host and the command.
SSH = """#!/bin/sh
options=
while [ "$1" != -- ]; do options="$options $1"; shift; done
echo "ssh$options, $2" >&2
shift 2
PATH={bin}:$PATH exec sh -c "$*"
"""
TOLD = """#!/bin/sh
for word; do echo "<$word>"; done
cat
exit 42
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an ssh, and a vmctl behind it that tells its words and its input."""
    (tmp_path / "bin").mkdir()
    for name, text in (("ssh", SSH.format(bin=tmp_path / "bin")), ("bin/vmctl", TOLD)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("VMCTL_SSH", f"{tmp_path / 'ssh'} -p 22")


@pytest.mark.usefixtures("ssh")
def test_words_input_and_status() -> None:
    """Words arrive unchanged, with any characters of a shell; so do input and status."""
    words = ["exec", "-i", "web", "--", "a b", "$HOME", "'\"", "*", "", "\n", "\udcff", "-n"]
    command = [str(VMCTL), "-v", "-H", "me@there", *words]
    done = subprocess.run(command, input=b"typed", capture_output=True, check=False, timeout=60)
    expected = "".join(f"<{word}>\n" for word in ["-v", *words]) + "typed"
    assert done.stdout == os.fsencode(expected)
    assert done.stderr == b"ssh -p 22 -T, me@there\n"
    assert done.returncode == 42


@pytest.mark.usefixtures("ssh")
def test_a_terminal() -> None:
    """The remote command has a terminal if this one has."""
    with ConsoleProcess([str(VMCTL), "-H", "there", "stat"], is_tty=True) as process:
        process.expect_errors("ssh -p 22 -t, there")
        process.expect("<stat>")
        process.send("\x04")
        assert process.wait() == 42


def test_input_is_left_alone() -> None:
    """A verb that does not read leaves standard input to a script's other commands."""
    command = command_for("h", "status", ["stat"], {})
    assert command == ["ssh", "-T", "-n", "--", "h", "exec vmctl stat"]


@pytest.mark.parametrize("host", ["", "-oProxyCommand=touch /tmp/x"])
def test_what_is_no_host(host: str) -> None:
    """A word that ssh would take for an option is refused."""
    with pytest.raises(CommandError, match="invalid host: "):
        command_for(host, "status", ["status"], {})


def test_an_ssh_that_is_not_there() -> None:
    """It is one line, and the status of no connection."""
    for value, status, line in (
        ("/none/ssh", 255, "vmctl: /none/ssh: No such file or directory\n"),
        ("ssh 'x", 1, "vmctl: No closing quotation\n"),
        ("''", 1, "vmctl: invalid VMCTL_SSH: no command\n"),
        (" ", 1, "vmctl: invalid VMCTL_SSH: no command\n"),
    ):
        done = subprocess.run(
            [VMCTL, "-H", "h", "status"],
            env={**os.environ, "VMCTL_SSH": value},
            capture_output=True,
            check=False,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout, done.stderr) == (status, "", line)


def test_what_is_read_here() -> None:
    """The verb is looked up here, and the options in front of it; nothing behind it."""
    invocation = read(["-H", "h", "-vv", "stat", "--nonsense"])
    assert invocation.words == ["h", "status", "-vv", "stat", "--nonsense"]
    assert read(["-H", "h", "--version"]).words == ["h", "", "--version"]
    for first in (["-Hh"], ["-vHh"], ["-vH", "h"]):
        verbose = ["-v"] * ("v" in first[0])
        assert read([*first, "stat"]).words == ["h", "status", *verbose, "stat"]
    with pytest.raises(UsageError):
        read(["-H", "h", "nonsense"])
    for words in (["-H"], ["-vH"], ["-H", ""]):
        with pytest.raises(UsageError, match=r"^vmctl: option '-H' requires an argument"):
            read(words)
