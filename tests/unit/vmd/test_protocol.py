"""The protocol is open: its page is up to date, and a client in another language speaks it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.vmctl.fake_daemon import FakeDaemon
from vmd.wire.messages import (
    AnyAnswer,
    AnyRequest,
    ErrorCode,
    Failed,
    Start,
    State,
    Status,
    VmInfo,
    Vms,
)

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_is_up_to_date() -> None:
    """docs/protocol.md equals the output of scripts/protocol.py."""
    made = subprocess.run(
        [sys.executable, ROOT / "scripts" / "protocol.py"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert (ROOT / "docs" / "protocol.md").read_text() == made


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example client, compiled."""
    path = tmp_path_factory.mktemp("client") / "client"
    source = ROOT / "examples" / "client.c"
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-o", path, source], check=True)
    return path


def test_a_client_in_c(client: Path, tmp_path: Path) -> None:
    """The client in C sends requests, and reads all parts of an answer."""
    vm = VmInfo(id=1, name="web", state=State.STOPPED, cpus=1, memory=1 << 29)

    def answer(request: AnyRequest) -> list[AnyAnswer]:
        if isinstance(request, Start):
            return [Failed(code=ErrorCode.ENOENT)]
        return [Vms(vms=(vm,), has_more=True), Vms(vms=(vm,))]

    path = tmp_path / "vmd.sock"
    with FakeDaemon(path, answer) as daemon:
        status = subprocess.run(
            [client, path, '{"type": "status", "name": "web"}'],
            check=False,
            capture_output=True,
            text=True,
        )
        start = subprocess.run(
            [client, path, '{"type": "start", "name": "x"}'],
            check=False,
            capture_output=True,
            text=True,
        )
    assert daemon.requests == [Status(name="web"), Start(name="x")]
    assert status.returncode == 0
    assert status.stdout.count('"name":"web"') == 2
    assert (start.returncode, start.stderr) == (1, "")
    assert '"code":"ENOENT"' in start.stdout
