"""docs/tutorial.md, followed to the letter."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import installed
from tests.debian import debian
from tests.guest.networks import Namespace, namespace
from tests.guest.tools import missing
from tests.tutorial import ROOT, Typed, Where, steps
from tests.vmctl_driver import VMCTL, ConsoleProcess

PROGRAMS = ("passt", "ssh", "ssh-keygen", "wget")

pytestmark = [
    *(pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(1800)),
    pytest.mark.skipif(bool(missing(PROGRAMS)), reason=missing(PROGRAMS)),
]

STEP_S = 1200.0
IMAGE = "debian-12-nocloud-amd64.qcow2"
KEY = "ssh-ed25519 AAAA..."
PROMPT = "reader> "
PROMPTS = {
    Where.SHELL: r"reader> ",
    Where.GUEST: r"root@debian:~# ",
    Where.LOGIN: r"\w+ login: ",
    Where.CONSOLE: r"leaves, ~\? lists more\)",
}


@pytest.fixture
def space() -> Iterator[Namespace]:
    """A network with a way out, which passt needs."""
    with namespace("-tutorial") as made:
        made.ip("link", "add", "out0", "type", "veth", "peer", "name", "out1")
        made.ip("link", "set", "out0", "up")
        made.ip("link", "set", "out1", "up")
        made.ip("addr", "add", "192.0.2.10/24", "dev", "out0")
        made.ip("route", "add", "default", "via", "192.0.2.1")
        try:
            yield made
        finally:
            _end(made)


def _end(space: Namespace) -> None:
    """End the processes in the namespace: the daemon that was started there, with its VMs."""
    deadline = time.monotonic() + STEP_S
    while pids := subprocess.run(
        ["ip", "netns", "pids", space.name], check=True, capture_output=True, text=True
    ).stdout.split():
        assert time.monotonic() < deadline, pids
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGTERM)
        time.sleep(0.5)


def reader(here: Path, space: Namespace) -> ConsoleProcess:
    """Start the reader's shell on a terminal; it downloads our image."""
    programs = here / "bin"
    programs.mkdir()
    image = here / "published.qcow2"
    installed.create("-i", debian(is_server=True).disk, image)
    download = programs / "wget"
    real = shlex.quote(str(shutil.which("wget")))
    download.write_text(
        f'#!/bin/sh\ncase $* in\n*/{IMAGE}) cp {image} {IMAGE} ;;\n*) exec {real} "$@" ;;\nesac\n'
    )
    download.chmod(0o755)
    home = here / "home"
    home.mkdir()
    command = 'cd "$HOME" && exec setsid --ctty --wait bash --norc --noprofile --noediting -i 2>&1'
    return ConsoleProcess(
        space.command("sh", "-c", command),
        is_tty=True,
        environment={
            "HOME": str(home),
            "PATH": f"{programs}:{VMCTL.parent}:{os.environ['PATH']}",
            "PS1": PROMPT,
            "TERM": "dumb",
            # root's commands would connect to the system's daemon.
            "VMD_SOCKET": str(home / "vmd.sock"),
            "XDG_RUNTIME_DIR": str(home),
            "XDG_STATE_HOME": str(home / "state"),
        },
    )


def follow(shell: ConsoleProcess, typed: Typed, key: Path) -> None:
    """Wait for the prompt, and type."""
    shell.expect(PROMPTS[typed.where], STEP_S)
    text = typed.text
    if KEY in text:
        text = text.replace(KEY, key.read_text().strip())
    # Enter ends the last line of a terminal; a console's escape needs none.
    shell.send(text if typed.where is Where.CONSOLE else f"{text}\n")


def test_the_tutorial(space: Namespace, tmp_path: Path) -> None:
    """A reader ends in a session by ssh, and sees the page of a web server in the guest."""
    wanted = list(steps((ROOT / "docs" / "tutorial.md").read_text()))
    assert [one for one in wanted if KEY in one.text]
    with reader(tmp_path, space) as shell:
        begins = {}
        for typed in wanted:
            follow(shell, typed, tmp_path / "home" / "first.key.pub")
            begins[typed.text] = len(shell.output)
        shell.expect(PROMPTS[Where.SHELL], STEP_S)
        # The daemon may log to this terminal: it does not end with the shell.
        shown = shell.output
    assert b"debian\r\n" in shown[begins["hostname"] : begins["exit"]]
    assert b"configuration OK" in shown
    assert b"terminated vm 1" in shown
    assert "lighttpd" in (tmp_path / "home" / "page.html").read_text()
