"""The report on a host, as far as a test can change its parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.vmctl.conftest import Serve
from vmctl.line.cli import main


def findings(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    """Run the command; returns its findings by their names."""
    assert main(["doctor", "--json"]) in {0, 1}
    return {one["check"]: one for one in json.loads(capsys.readouterr().out)}


def test_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs for networks are found by PATH, or the missing package is named."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "passt").write_text("#!/bin/sh\n")
    (tmp_path / "passt").chmod(0o755)
    found = findings(capsys)
    assert found["passt"]["detail"].startswith(f"{tmp_path}/passt: ")
    assert (found["nft"]["status"], found["nft"]["hint"]) == ("limited", "apt install nftables")


def test_the_daemon(
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The report says whether a daemon listens, and if not, how to start one."""
    serve(lambda _: [])
    found = findings(capsys)["vmd"]
    told = f"listens at {tmp_path}/vmd.sock: only root"
    assert (found["status"], found["detail"].startswith(told)) == ("ok", True)
    assert found["detail"].endswith(" may connect")
    monkeypatch.setenv("VMD_SOCKET", str(tmp_path / "none"))
    found = findings(capsys)["vmd"]
    assert found["status"] == "limited"
    assert found["detail"] == f"connect: {tmp_path}/none: No such file or directory"
    assert "vmd --user" in found["hint"]


def test_memory_and_what_nothing_uses(capsys: pytest.CaptureFixture[str]) -> None:
    """Memory is reported; a device that no VM uses is not asked for."""
    found = findings(capsys)
    assert found["memory"]["detail"].endswith(" available")
    assert {"user", "tun", "seabios"} <= set(found)
    assert "vhost-vsock" not in found
