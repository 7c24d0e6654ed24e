"""How far a snapshot is, on a terminal."""

from __future__ import annotations

import os
import pty
import select
from pathlib import Path

import pytest

from tests.unit.vmctl.conftest import Serve
from tests.unit.vmctl.fake_daemon import Answers
from vmctl.daemon.snapshots import snapshot
from vmd.wire.messages import AnyRequest, Done, Event, EventKind, Events
from vmd.wire.transfers import Snapshot

_PATIENCE_S = 20


def read_until(fd: int, text: bytes) -> bytes:
    """Read until `text` was there."""
    seen = b""
    while text not in seen:
        assert select.select([fd], [], [], _PATIENCE_S)[0], seen
        seen += os.read(fd, 4096)
    return seen


def test_a_bar_on_a_terminal(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It follows the events of this VM alone, and is gone when all is written."""
    master, slave = pty.openpty()
    shown = b""

    def answer(request: AnyRequest) -> Answers:
        nonlocal shown
        if isinstance(request, Events):
            told = (("other", "90%"), ("one", "50%"))
            return [
                Done(),
                *(
                    Event(kind=EventKind.WRITING, id=1, name=name, at=0.0, message=text)
                    for name, text in told
                ),
            ]
        assert isinstance(request, Snapshot)
        shown += read_until(master, b"50%")
        return [Done(id=1)]

    serve(answer)
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        assert snapshot(["one"], output=str(tmp_path / "file")) == 0
        terminal.flush()
        shown += read_until(master, b"of vm 1")
        monkeypatch.undo()
    os.close(master)
    assert shown.decode().replace("\r\n", "\n") == (
        f"\r\x1b[Kone [{'#' * 20}{'.' * 20}] 50%"
        f"\r\x1b[Kvmctl: made snapshot {tmp_path}/file of vm 1\n"
    )
