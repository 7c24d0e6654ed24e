"""The log of a daemon that the journal reads: entries with fields, by the native protocol."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Self

import pytest

from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import READY, TIMEOUT_S, Daemon, vm_block
from tests.system.vmd.users import USER, connection

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.root,
    needs_separation,
]

Entry = dict[str, str]

# The journal's socket is another one here.
PROGRAM = "import vmd.shared.log as log; log._JOURNAL = {!r}; from vmd.__main__ import main; main()"


class Journal:
    """A socket like the journal's, and its messages; a context manager."""

    def __init__(self, path: Path) -> None:
        """Listen at `path`, for the daemon's users."""
        self.entries: list[Entry] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        path.chmod(0o666)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def entry(self, text: str) -> Entry:
        """Wait for the entry whose message has a text."""
        end = time.monotonic() + TIMEOUT_S
        while True:
            for entry in self.entries:
                if text in entry["MESSAGE"]:
                    return entry
            assert time.monotonic() < end, "\n".join(entry["MESSAGE"] for entry in self.entries)
            self._socket.settimeout(0.5)
            try:
                packet = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            lines = packet.decode().splitlines()
            pairs = [line.partition("=") for line in lines]
            assert all(equals and name.isupper() for name, equals, _ in pairs), lines
            assert len(dict.fromkeys(name for name, _, _ in pairs)) == len(pairs), lines
            self.entries.append({name: value for name, _, value in pairs})


def test_entries_have_fields(reachable: Path) -> None:
    """The journal has requests with user and VM, events of a VM, and its process's messages."""
    config = f"socket owner {USER}\n" + vm_block("web") + vm_block("own", f"owner {USER}")
    log = reachable / "log"
    log.touch()
    stream = log.stat()
    with (
        Journal(reachable / "journal") as journal,
        Daemon(
            reachable,
            config,
            is_user=False,
            program=("-c", PROGRAM.format(str(reachable / "journal"))),
            environ={"JOURNAL_STREAM": f"{stream.st_dev}:{stream.st_ino}"},
        ) as vmd,
    ):
        with connection(vmd, USER) as client:
            assert client.ask("start", name="web")["code"] == "EPERM"
            refused = journal.entry("web: start by ")
            assert refused["MESSAGE"].endswith("failed: the VM is not yours")
            expected = {"PRIORITY": "6", "SYSLOG_IDENTIFIER": "vmd", "VM": "web"}
            assert {**refused, **expected, "UID": str(USER), "REQUEST": "start"} == refused
            # A name is a client's text: it makes no field of its own.
            assert client.ask("stop", name="a\nUID=0\nVM=web")["type"] == "failed"
            hostile = journal.entry("stop by ")
            assert hostile["UID"] == str(USER)
            assert hostile["VM"] == "a\\x0aUID=0\\x0aVM=web"

            assert client.ask("start", name="own")["type"] == "started"
            assert journal.entry("own: started by ")["REQUEST"] == "start"
            ready = journal.entry("started own (vm ")
            assert (ready["VM"], "UID" in ready) == ("own", False)
            with client.console("own") as console:
                console.expect(READY)
                pid = vmd.wait_for_child("vm/own")
                os.kill(pid, 9)
                ended = journal.entry("vm/own: failed: ")
                assert (ended["VM"], ended["PRIORITY"]) == ("own", "4")
        vmd.stop()
        # Other processes write there too.
        assert journal.entry("control: control exiting")["PRIORITY"] == "6"
    assert log.read_bytes() == b""


def test_without_the_journals_socket(reachable: Path) -> None:
    """Messages are lines with priorities, as ever."""
    log = reachable / "log"
    log.touch()
    stream = log.stat()
    with Daemon(
        reachable,
        "",
        program=("-c", PROGRAM.format(str(reachable / "none"))),
        environ={"JOURNAL_STREAM": f"{stream.st_dev}:{stream.st_ino}"},
    ):
        pass
    lines = log.read_text().splitlines()
    assert lines
    assert all(line.startswith("<") for line in lines), lines
