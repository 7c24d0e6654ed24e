"""The past of VMs: `log` of one, its last end, and VMs that are gone."""

from __future__ import annotations

import json
import re
import time

import pytest
from msgspec.structs import replace

from tests.unit.vmctl.conftest import Serve
from tests.unit.vmctl.test_commands import DB, HEADER, WEB, WEB_LINE, failed
from vmctl.line.cli import main as vmctl
from vmctl.moment import span
from vmd.wire.messages import (
    AnyAnswer,
    AnyRequest,
    DiskInfo,
    Done,
    EndCause,
    EndInfo,
    ErrorCode,
    History,
    InterfaceInfo,
    Lines,
    Log,
    LogLine,
    State,
    Status,
    Vms,
)

AT = 1_790_000_000.0
TIME = r"2026-09-2\dT\d\d:\d\d:20[+-]\d{4}"
LINES = Lines(
    lines=(LogLine(at=AT, text="started"), LogLine(at=AT, text="failed: \x1b[31mpanic")),
    position=2,
)
CRASH = EndInfo(at=AT, reason=EndCause.CRASHED, message="panic", exit=0, started_at=AT - 60)
GONE = replace(DB, id=9, name="old", state=State.GONE, last_end=CRASH)


def test_what_was_logged_of_a_vm(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """Each log line has its time; control characters are escaped. JSON has them unchanged."""
    daemon = serve(lambda _: [LINES])
    assert vmctl(["log", "web"]) == 0
    output, errors = capsys.readouterr()
    assert re.fullmatch(f"{TIME} started\n{TIME} failed: \\\\x1b\\[31mpanic\n", output)
    assert errors == ""
    assert vmctl(["log", "--json", "3"]) == 0
    (first, second) = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"at": AT, "text": "started"}
    assert second["text"] == "failed: \x1b[31mpanic"
    assert daemon.requests == [History(name="web"), History(id=3)]


@pytest.mark.parametrize(("word", "level"), [("b", 0), ("BRIEF", 0), ("v", 2), ("verbose", 2)])
def test_levels_are_openbsds(word: str, level: int, serve: Serve) -> None:
    """A word that can be a level is one, in upper or lower case, and prints nothing."""
    daemon = serve(lambda _: [Done()])
    assert vmctl(["log", word]) == 0
    assert daemon.requests == [Log(level=level)]


def test_a_vm_whose_name_is_a_level(serve: Serve) -> None:
    """An option, or its id, chooses the VM."""
    daemon = serve(lambda _: [LINES])
    assert vmctl(["log", "--json", "brief"]) == 0
    assert daemon.requests == [History(name="brief")]


def test_what_is_logged_from_now_on(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """With -f only new lines follow, until the daemon has forgotten the VM."""
    answers: list[AnyAnswer] = [
        LINES,
        Lines(lines=(), position=2),
        Lines(lines=(LogLine(at=AT, text="removed"),), position=3),
        failed(ErrorCode.ENOENT, "no such VM"),
    ]
    daemon = serve(lambda _: [answers.pop(0)])
    assert vmctl(["log", "-f", "web"]) == 1
    output, errors = capsys.readouterr()
    assert [line.split()[-1] for line in output.splitlines()] == [
        "started",
        "\\x1b[31mpanic",
        "removed",
    ]
    assert "no such VM" in errors
    positions = [each.position for each in daemon.requests if isinstance(each, History)]
    assert positions == [0, 2, 2, 3]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (ErrorCode.EPERM, "vmctl: command failed: Operation not permitted\n"),
        (ErrorCode.ENOENT, "vmctl: command failed: No such file or directory\n"),
    ],
)
def test_a_log_that_is_refused(
    code: ErrorCode, text: str, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refused log is one line and status 1."""
    serve(lambda _: [failed(code)])
    assert vmctl(["log", "web"]) == 1
    assert capsys.readouterr() == ("", text)


def test_status_of_all(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """After OpenBSD's columns follow the guest's address, and when and why the VM ended."""
    interface = InterfaceInfo(lladdr="", guest_addresses=("100.64.1.3/31", "fd00::2/64"))
    web = replace(WEB, interfaces=(InterfaceInfo(lladdr=""), interface))
    daemon = serve(lambda _: [Vms(vms=(web, GONE))])
    assert vmctl(["status", "-a"]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header == HEADER.rstrip("\n") + " ADDRESS ENDED REASON"
    assert first == WEB_LINE.rstrip("\n") + " 100.64.1.3 - -"
    assert re.search(f" gone old - {TIME} crashed: panic$", second)
    assert daemon.requests == [Status(interfaces=True, gone=True)]
    assert vmctl(["status", "-a", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told[1]["last_end"] == {
        "at": AT,
        "reason": "crashed",
        "message": "panic",
        "exit": 0,
        "started_at": AT - 60,
    }


def test_show_tells_all_of_a_vm(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """Show has the boot image, the disks, the time of the start, and the last end."""
    web = replace(
        WEB,
        started_at=time.time() - 3700,
        boot="/vmlinuz",
        append="console=ttyS0",
        disks=(
            DiskInfo(path="/web.qcow2", format="qcow2", serial="root"),
            DiskInfo(path="/data.img", is_read_only=True),
        ),
        cdrom="/x.iso",
        after=("db", "app"),
        last_end=CRASH,
    )
    serve(lambda _: [Vms(vms=(web,))])
    assert vmctl(["show", "web"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:-1] == [
        "uptime: 1h 1m",
        "boot: /vmlinuz",
        "append: console=ttyS0",
        "disk 0: /web.qcow2 qcow2 serial root",
        "disk 1: /data.img ro",
        "cdrom: /x.iso",
        "after: db, app",
    ]
    assert re.fullmatch(f"last end: {TIME} crashed: panic \\(exit 0\\)", lines[-1])


def test_show_of_one_that_is_gone(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """A name stands for its latest VM, unless there is one that is not gone."""
    vms = [GONE, replace(GONE, id=4)]

    def answer(_request: AnyRequest) -> list[AnyAnswer]:
        return [Vms(vms=tuple(vms))]

    serve(answer)
    assert vmctl(["show", "old"]) == 0
    _, row, *rest = capsys.readouterr().out.splitlines()
    assert row.split()[0] == "9"
    assert "crashed: panic" in rest[0]
    vms.insert(0, replace(DB, id=5, name="old"))
    assert vmctl(["show", "old"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ID", "5"]


def test_times_that_have_passed() -> None:
    """Times have their two largest units, and are never negative."""
    assert [span(seconds) for seconds in (-5, 0, 59.9, 61, 7260, 90000, 9e6)] == [
        "0s",
        "0s",
        "59s",
        "1m 1s",
        "2h 1m",
        "1d 1h",
        "104d 4h",
    ]


def test_show_tells_of_a_network_that_is_down(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    """Show has the reason, and without a host's side still the guest's addresses."""
    interfaces = (
        InterfaceInfo(lladdr="a", is_local=True, is_up=False, problem="passt has ended: offline"),
        InterfaceInfo(lladdr="b", is_local=True, guest_addresses=("192.0.2.2", "fd00::2")),
    )
    serve(lambda _: [Vms(vms=(replace(WEB, interfaces=interfaces),))])
    assert vmctl(["show", "web"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "interface 0: - lladdr a local mtu 1500 down",
        "\tproblem: passt has ended: offline",
        "interface 1: - lladdr b local mtu 1500 up",
        "\tguest 192.0.2.2",
        "\tguest fd00::2",
    ]


def test_a_vm_whose_process_was_killed(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit of a killed process is the negative signal, in every list of VMs."""
    killed = EndInfo(at=AT, reason=EndCause.KILLED, exit=-9)
    serve(lambda _: [Vms(vms=(replace(WEB, last_end=killed),))])
    assert vmctl(["status"]) == vmctl(["status", "-a"]) == vmctl(["list"]) == 0
    assert vmctl(["show", "web"]) == 0
    assert "killed (exit -9)" in capsys.readouterr().out
