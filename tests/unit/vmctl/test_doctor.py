"""The report on a host, as far as a test can change its parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.vmctl.conftest import Serve
from vmctl.doctor import Status, encryption, swtpm
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


def test_encryption(tmp_path: Path) -> None:
    """The processor, KVM and the device have to have it; a host without is no worse for that."""
    cpuinfo, parameters = tmp_path / "cpuinfo", tmp_path / "parameters"
    parameters.mkdir()
    cpuinfo.write_text("flags : fpu sse2\n")
    found = encryption(cpuinfo, parameters)
    assert (found.status, found.detail) == (Status.OK, "no: the processor has no AMD SEV")
    cpuinfo.write_text("flags : fpu sev sev_es sse2\n")
    (parameters / "sev").write_text("N\n")
    found = encryption(cpuinfo, parameters)
    assert found.status is Status.LIMITED
    assert found.detail == "the processor has sev, seves, but KVM does not use it"
    (parameters / "sev").write_text("Y\n")
    missing = tmp_path / "device"
    found = encryption(cpuinfo, parameters, str(missing))
    assert (found.detail, found.hint) == (f"{missing}: No such file or directory", "modprobe ccp")
    found = encryption(cpuinfo, parameters, "/dev/null")
    assert found.detail == "/dev/null: Inappropriate ioctl for device"


def test_swtpm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found or its package named; a profile of AppArmor has to have the line that lets it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    enabled, local = tmp_path / "enabled", tmp_path / "local" / "usr.bin.swtpm"
    missing = swtpm(enabled, tmp_path)
    assert (missing.status, missing.hint) == (Status.LIMITED, "apt install swtpm")
    (tmp_path / "swtpm").write_text("#!/bin/sh\n")
    (tmp_path / "swtpm").chmod(0o755)
    assert swtpm(enabled, tmp_path).status is Status.OK
    (tmp_path / "usr.bin.swtpm").touch()
    enabled.write_text("N\n")
    assert swtpm(enabled, tmp_path).status is Status.OK
    enabled.write_text("Y\n")
    kept_out = swtpm(enabled, tmp_path)
    assert kept_out.status is Status.LIMITED
    assert kept_out.detail.endswith("AppArmor keeps it out of /var/lib/vmd/tpm")
    assert kept_out.hint.startswith("put 'owner /var/lib/vmd/tpm/** rwk,' into ")
    local.parent.mkdir()
    local.write_text("owner /var/lib/vmd/tpm/** rwk,\n")
    assert swtpm(enabled, tmp_path).status is Status.OK
