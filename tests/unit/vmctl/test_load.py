"""`vmctl load`: which file the daemon is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.vmctl.conftest import Serve
from vmctl.line.cli import main as vmctl
from vmd.wire.messages import Done, Load


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("vm.conf", "{}/vm.conf"),
        ("./vm.conf", "{}/./vm.conf"),
        ("../vm.conf", "{}/../vm.conf"),
        ("link/../vm.conf", "{}/link/../vm.conf"),  # which is beside the link's target
        ("vm.conf/", "{}/vm.conf/"),  # which is no file
        ("-", "{}/-"),
        ("~/vm.conf", "{}/~/vm.conf"),
        ("a b\n.conf", "{}/a b\n.conf"),
        ("//dev/null", "//dev/null"),
        ("/etc/vm.conf", "/etc/vm.conf"),
    ],
)
def test_what_load_asks_for(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, meant: str
) -> None:
    """The daemon is asked for the file that the kernel would open for the user."""
    daemon = serve(lambda _: [Done()])
    monkeypatch.chdir(tmp_path)
    assert vmctl(["load", "--", word]) == 0
    assert [one for one in daemon.requests if isinstance(one, Load)] == [
        Load(path=meant.format(tmp_path))
    ]


@pytest.mark.parametrize(
    ("word", "why"), [("", "No such file or directory"), ("a" * 5000, "File name too long")]
)
def test_what_load_refuses(word: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No daemon is asked for what no file can be called."""
    assert vmctl(["load", word]) == 1
    assert capsys.readouterr().err == f"vmctl: failed to open {word}: {why}\n"
