"""A daemon for the commands to speak with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.unit.vmctl.fake_daemon import Answers, FakeDaemon
from vmd.wire.messages import AnyRequest

Serve = Callable[[Callable[[AnyRequest], Answers]], FakeDaemon]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start a daemon that answers by a function, where the commands look for one."""
    path = tmp_path / "vmd.sock"
    monkeypatch.setenv("VMD_SOCKET", str(path))
    with ExitStack() as stack:
        yield lambda answer: stack.enter_context(FakeDaemon(path, answer))
