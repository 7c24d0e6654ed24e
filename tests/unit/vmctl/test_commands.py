"""The commands: each one's request to the daemon, and its report of the answer."""

from __future__ import annotations

import grp
import json
import os
import socket
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.unit.vmctl.conftest import Serve
from vmctl.advice import advice, may_connect
from vmctl.line.cli import main as vmctl
from vmd.wire.channel import ChannelError
from vmd.wire.messages import (
    AnyAnswer,
    AnyRequest,
    Console,
    Done,
    ErrorCode,
    Event,
    EventKind,
    Events,
    Failed,
    ForwardInfo,
    InterfaceInfo,
    InterfaceRequest,
    Load,
    Log,
    Pause,
    Reload,
    Reset,
    ResetMode,
    Start,
    Started,
    State,
    Status,
    Stop,
    Terminated,
    Unpause,
    VmInfo,
    Vms,
    Wait,
)
from vmd.wire.parts import DiskRequest, Statistics
from vmm_kvm.boot_device import BootDevice

HEADER = "   ID   PID VCPUS  MAXMEM  CURMEM     TTY        OWNER    STATE NAME\n"
WEB = VmInfo(
    id=1,
    name="web",
    state=State.RUNNING,
    cpus=2,
    memory=1 << 30,
    memory_used=270 << 20,
    pid=71234,
    tty="/dev/pts/2",
)
DB = VmInfo(
    id=2,
    name="db",
    state=State.WAITING,
    cpus=1,
    memory=512 << 20,
    uid=4_000_000_001,
    gid=4_000_000_002,
)
WEB_LINE = "    1 71234     2    1.0G    270M   pts/2         root  running web\n"
DB_LINE = "    2     -     1    512M       -       - 4000000001:4000  waiting db\n"
STARTED = Started(id=7, pid=700, tty="/dev/pts/7")


def failed(code: ErrorCode, message: str = "") -> Failed:
    """Return a failed answer."""
    return Failed(code=code, message=message)


@pytest.mark.parametrize(
    ("arguments", "request_", "answer", "errors", "status"),
    [
        (
            "stop web",
            Stop(name="web"),
            Done(id=1),
            "stopping vm web: requested to shutdown vm 1",
            0,
        ),
        ("stop 1", Stop(id=1), Done(id=1), "stopping vm: requested to shutdown vm 1", 0),
        (
            "stop -f web",
            Stop(name="web", force=True),
            Done(id=1),
            "stopping vm web: requested to shutdown vm 1",
            0,
        ),
        (
            "stop -fw web",
            Stop(name="web", force=True, wait=True),
            Terminated(id=1),
            "stopping vm web: terminated vm 1",
            0,
        ),
        (
            "sto -w -f web",
            Stop(name="web", force=True, wait=True),
            Terminated(id=1),
            "stopping vm web: terminated vm 1",
            0,
        ),
        (
            "stop web",
            Stop(name="web"),
            failed(ErrorCode.NOT_RUNNING, "the VM is not running"),
            "stopping vm web: cannot stop vm that is not running",
            1,
        ),
        (
            "stop web",
            Stop(name="web"),
            failed(ErrorCode.ENOENT),
            "stopping vm web: vm not found",
            1,
        ),
        (
            "stop web",
            Stop(name="web"),
            failed(ErrorCode.EPERM),
            "stopping vm web: failed: Operation not permitted",
            1,
        ),
        ("wait web", Wait(name="web"), Terminated(id=1), "waiting for vm web: terminated vm 1", 0),
        (
            "wait --timeout 60 web",
            Wait(name="web"),
            Terminated(id=1),
            "waiting for vm web: terminated vm 1",
            0,
        ),
        (
            "w 3",
            Wait(id=3),
            failed(ErrorCode.EINTR),
            "waiting for vm: interrupted call",
            1,
        ),
        ("pause web", Pause(name="web"), Done(id=1), "vmctl: paused vm 1 successfully", 0),
        ("u web", Unpause(name="web"), Done(id=1), "vmctl: unpaused vm 1 successfully", 0),
        (
            "pause web",
            Pause(name="web"),
            failed(ErrorCode.EPERM, "the VM is not yours"),
            "vmctl: pause vm command failed: Operation not permitted\nvmctl: the VM is not yours",
            1,
        ),
        ("load /etc/more", Load(path="/etc/more"), Done(), "", 0),
        (
            "load /etc/more",
            Load(path="/etc/more"),
            failed(ErrorCode.COMMAND_FAILED),
            "vmctl: command failed",
            1,
        ),
        ("reload", Reload(), Done(), "", 0),
        (
            "reload",
            Reload(),
            failed(ErrorCode.EPERM),
            "vmctl: command failed: Operation not permitted",
            1,
        ),
        ("reset", Reset(), Done(), "", 0),
        ("reset VMs", Reset(mode=ResetMode.VMS), Done(), "", 0),
        ("reset switches", Reset(mode=ResetMode.SWITCHES), Done(), "", 0),
        ("log b", Log(level=0), Done(), "", 0),
        ("log Verb", Log(level=2), Done(), "", 0),
        (
            "start web",
            Start(name="web"),
            STARTED,
            "vmctl: started vm 7 successfully, tty /dev/pts/7",
            0,
        ),
        ("start 7", Start(id=7), STARTED, "vmctl: started vm 7 successfully, tty /dev/pts/7", 0),
        *(
            ("start web", Start(name="web"), failed(code), f"vmctl: {text}", 1)
            for code, text in (
                (ErrorCode.BIOS_MISSING, "vmm bios firmware file not found."),
                (ErrorCode.DISK_MISSING, "could not open disk image(s)"),
                (ErrorCode.CDROM_MISSING, "could not find specified iso image"),
                (ErrorCode.CDROM_INVALID, "specified iso image is not a regular file"),
                (ErrorCode.TEMPLATE_INVALID, "invalid template"),
                (ErrorCode.EALREADY, "start vm command failed: Operation already in progress"),
                (ErrorCode.EPROCLIM, "start vm command failed: Too many processes"),
            )
        ),
        (
            "console web",
            Console(name="web"),
            failed(ErrorCode.NOT_RUNNING),
            "vmctl: console not found",
            1,
        ),
        (
            "console web",
            Console(name="web"),
            failed(ErrorCode.EPERM),
            "vmctl: failed to open the console: Operation not permitted",
            1,
        ),
    ],
)
def test_requests_and_texts(  # noqa: PLR0917 - fixtures come by name
    arguments: str,
    request_: AnyRequest,
    answer: AnyAnswer,
    errors: str,
    status: int,
    serve: Serve,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each command sends one request; the answer has OpenBSD's text and exit status."""
    daemon = serve(lambda _: [answer])
    assert vmctl(arguments.split()) == status
    assert daemon.requests == [request_]
    assert capsys.readouterr() == ("", f"{errors}\n" if errors else "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], HEADER + WEB_LINE + DB_LINE),
        (["-r"], HEADER + WEB_LINE),
        (["web"], HEADER + WEB_LINE),
        (["2"], HEADER + DB_LINE),
        (["0"], HEADER + WEB_LINE + DB_LINE),
        (["none"], HEADER),
        (["-r", "db"], HEADER),
    ],
)
def test_status(
    arguments: list[str], expected: str, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status has OpenBSD's columns; a name picks rows, and never makes it fail."""
    serve(lambda _: [Vms(vms=(WEB,), has_more=True), Vms(vms=(DB,))])
    for verb in ("status", "show", "stat"):
        assert vmctl([verb, *arguments]) == 0
        assert capsys.readouterr() == (expected, "")


@pytest.mark.parametrize(("arguments", "vms"), [([], ()), (["-r"], (DB,))])
def test_status_of_nothing(
    arguments: list[str],
    vms: tuple[VmInfo, ...],
    serve: Serve,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If there is no VM at all, or none that runs, the exit status is 1."""
    serve(lambda _: [Vms(vms=vms)])
    assert vmctl(["status", *arguments]) == 1
    assert capsys.readouterr() == (HEADER, "")


def test_status_in_json(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """Status as JSON has the protocol's fields."""
    serve(lambda _: [Vms(vms=(WEB, DB))])
    assert vmctl(["status", "--json", "db"]) == 0
    (vm,) = json.loads(capsys.readouterr().out)
    assert vm == {
        "id": 2,
        "name": "db",
        "state": "waiting",
        "cpus": 1,
        "memory": 512 << 20,
        "memory_used": None,
        "pid": None,
        "tty": "",
        "pause_reason": "",
        "uid": 4_000_000_001,
        "gid": 4_000_000_002,
        "is_from_config": False,
        "started_at": None,
        "clone_of": "",
        "is_template": False,
        "has_tpm": False,
        "after": [],
        "last_end": None,
        "statistics": None,
        "interfaces": [],
        "boot": "",
        "append": None,
        "disks": [],
        "cdrom": "",
        "shares": [],
    }


INTERFACE = InterfaceInfo(
    lladdr="fe:e1:bb:d1:00:01",
    tap="tap3",
    is_local=True,
    is_locked=True,
    host_addresses=("100.64.1.2/31", "fd00::1/96"),
    guest_addresses=("100.64.1.3/31", "fd00::2/64"),
    forwards=(
        ForwardInfo(protocol="tcp", port=8080, to_port=80, address="127.0.0.1"),
        ForwardInfo(protocol="udp", port=53, to_port=53),
    ),
    received=100,
    received_packets=2,
    sent=50,
    sent_packets=1,
)


def test_show(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """With a name, the VM's details follow the row; without one, nothing does."""
    stopped = InterfaceInfo(lladdr="fe:e1:bb:d2:00:01", switch="uplink", rdomain=0, is_up=False)
    web = replace(WEB, interfaces=(INTERFACE, stopped))
    daemon = serve(lambda _: [Vms(vms=(web, DB))])
    expected = """\
interface 0: tap3 lladdr fe:e1:bb:d1:00:01 locked local mtu 1500 up
	host 100.64.1.2/31 guest 100.64.1.3/31
	host fd00::1/96 guest fd00::2/64
	forward tcp 127.0.0.1 8080 to 80
	forward udp * 53 to 53
	received 100 bytes, 2 packets, 0 dropped
	sent 50 bytes, 1 packets
interface 1: - lladdr fe:e1:bb:d2:00:01 switch uplink rdomain 0 mtu 1500 down
"""
    assert vmctl(["show", "web"]) == 0
    assert capsys.readouterr() == (HEADER + WEB_LINE + expected, "")
    assert vmctl(["show"]) == vmctl(["status", "web"]) == 0
    assert capsys.readouterr().out == HEADER + WEB_LINE + DB_LINE + HEADER + WEB_LINE
    assert daemon.requests == [Status(interfaces=True, devices=True, gone=True), Status(), Status()]
    assert vmctl(["show", "--json", "web"]) == 0
    (vm,) = json.loads(capsys.readouterr().out)
    assert vm["interfaces"][0]["forwards"] == [
        {"protocol": "tcp", "port": 8080, "to_port": 80, "address": "127.0.0.1"},
        {"protocol": "udp", "port": 53, "to_port": 53, "address": ""},
    ]
    assert vm["interfaces"][1]["switch"] == "uplink"


@pytest.mark.parametrize(
    ("line", "answer", "told"),
    [
        ("start web", STARTED, {"id": 7, "pid": 700, "tty": "/dev/pts/7", "exit": 0}),
        ("start web", failed(ErrorCode.EPERM, "not yours"), {"exit": 1, "reason": "not yours"}),
        (
            "start web",
            failed(ErrorCode.EALREADY),
            {"exit": 1, "reason": "start vm command failed: Operation already in progress"},
        ),
        ("start a/b", STARTED, {"exit": 1, "reason": "invalid VM name"}),
        ("stop web", Done(id=1), {"id": 1, "exit": 0, "reason": "requested to shutdown"}),
        ("stop -w web", Terminated(id=1), {"id": 1, "exit": 0, "reason": "terminated"}),
        ("stop web", failed(ErrorCode.ENOENT), {"id": None, "exit": 1, "reason": "vm not found"}),
        ("wait web", Terminated(id=1), {"id": 1, "exit": 0, "reason": "terminated"}),
        (
            "wait --timeout 9 web",
            failed(ErrorCode.EINTR),
            {"exit": 1, "reason": "interrupted call"},
        ),
        (
            "wait --timeout x web",
            Done(),
            {"exit": 1, "reason": "invalid time-out: x: not a number of seconds"},
        ),
    ],
)
def test_json_of_what_has_become_of_a_vm(
    line: str,
    answer: AnyAnswer,
    told: dict[str, object],
    serve: Serve,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The outcome is one line of JSON with the same fields each time."""
    serve(lambda _: [answer])
    verb, rest = line.split(" ", 1)
    status = vmctl([verb, "--json", *rest.split()])
    fields = json.loads(capsys.readouterr().out)
    assert list(fields) == ["id", "pid", "tty", "exit", "reason", "seconds"]
    assert fields["exit"] == status
    assert 0 <= fields["seconds"] < 20
    assert {name: fields[name] for name in told} == told


def test_start_with_everything(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every option has its place in the request; paths are absolute, files are sent open."""
    (tmp_path / "link.img").symlink_to("disk.img")
    for name in ("disk.img", "other.img", "kernel", "ramdisk", "cd.iso"):
        (tmp_path / name).write_bytes(b"x")
    daemon = serve(lambda _: [STARTED])
    here = str(tmp_path)
    arguments = [
        *("start", "-B", "cdrom", "-b", f"{here}/kernel", "-d", f"{here}/link.img"),
        *("-d", f"raw:{here}/../{tmp_path.name}/other.img,ro,serial=x", "-i", "3", "-L", "-n"),
        *("uplink", "-m", "1.5G", "-p", "4", "-r", f"{here}/cd.iso", "-t", "base"),
        *("--append", "quiet", "--initrd", f"{here}/ramdisk", "new"),
    ]
    assert vmctl(arguments) == 0
    wanted = Start(
        name="new",
        instance="base",
        memory=3 << 29,
        cpus=4,
        kernel=0,
        kernel_path=f"{here}/kernel",
        initrd=(1,),
        append="quiet",
        disks=(
            DiskRequest(path=f"{here}/disk.img", chain=(2,)),
            DiskRequest(
                path=f"{here}/other.img", format="raw", is_read_only=True, serial="x", chain=(3,)
            ),
        ),
        interfaces=(
            InterfaceRequest(is_local=True),
            InterfaceRequest(switch="uplink"),
            InterfaceRequest(),
        ),
        cdrom=f"{here}/cd.iso",
        cdrom_image=4,
        boot_device=BootDevice.CDROM,
    )
    assert daemon.requests == [wanted]
    assert daemon.fd_counts == [5]
    assert capsys.readouterr().err == "vmctl: started vm 7 successfully, tty /dev/pts/7\n"


def test_start_warns(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """A warning names what a VM will lack, or its real amount of memory; it starts."""
    serve(lambda _: [STARTED])
    assert vmctl(["start", "-m", "1025K", "-d", "/etc/passwd", "web"]) == 0
    assert capsys.readouterr().err == (
        "vmctl: memory size rounded to 1.0M\nvmctl: starting without network interfaces\n"
        "vmctl: started vm 7 successfully, tty /dev/pts/7\n"
    )


@pytest.mark.parametrize(
    ("word", "errors"),
    [
        ("", "missing vmid argument\ninvalid id: "),
        ("x" * 64, f"name too long\ninvalid id: {'x' * 64}"),
    ],
)
def test_ids(word: str, errors: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command refuses a word that is neither id nor name."""
    for verb in ("start", "stop", "pause", "unpause", "wait", "console", "status"):
        assert vmctl([verb, word]) == 1
        assert capsys.readouterr().err == "".join(f"vmctl: {one}\n" for one in errors.split("\n"))


def test_large_numbers_are_names(serve: Serve) -> None:
    """A number too large for an id is a name."""
    daemon = serve(lambda _: [Done(id=1)])
    assert vmctl(["pause", "4294967295"]) == 0
    assert vmctl(["pause", "4294967296"]) == 0
    assert daemon.requests == [Pause(id=4294967295), Pause(name="4294967296")]


def test_no_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If no daemon listens, every command names the socket that it has tried."""
    monkeypatch.setenv("VMD_SOCKET", str(tmp_path / "none"))
    for arguments in (["status"], ["stop", "x"], ["reload"], ["events"], ["top"], ["console", "x"]):
        assert vmctl(arguments) == 1
        text = (
            f"vmctl: connect: {tmp_path}/none: No such file or directory\n"
            "vmctl: vmd is not running: 'systemctl start vmd', "
            "or 'vmd --user' for VMs of your own\n"
        )
        assert capsys.readouterr() == ("", text)


def test_a_daemon_that_goes_away(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing answer is an error, not a hang or a traceback."""

    def leave(_: AnyRequest) -> list[AnyAnswer]:
        raise ChannelError("gone")

    serve(leave)
    assert vmctl(["pause", "web"]) == 1
    assert vmctl(["stop", "web"]) == 1
    assert capsys.readouterr().err == "vmctl: pipe closed\nstopping vm web: \nvmctl: pipe closed\n"


def test_another_version(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """A daemon with another version of the protocol says so."""
    serve(lambda _: [failed(ErrorCode.VERSION, "this daemon speaks version 2")])
    assert vmctl(["pause", "web"]) == 1
    assert capsys.readouterr().err == (
        "vmctl: pause vm command failed: vmd speaks another version of the protocol\n"
        "vmctl: this daemon speaks version 2\n"
    )


def an_event(kind: EventKind, message: str = "") -> Event:
    """Return an event of web."""
    return Event(kind=kind, id=1, name="web", at=1e9, message=message)


@pytest.mark.parametrize("as_json", [False, True])
def test_events(as_json: bool, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """Each event is a line, until the daemon ends; control characters are escaped."""
    daemon = serve(
        lambda _: [
            Done(),
            an_event(EventKind.STARTED),
            an_event(EventKind.FAILED, "disk /x\x1b[2J\n: gone"),
            failed(ErrorCode.EINTR),
        ]
    )
    assert vmctl(["events", *(["--json"] if as_json else [])]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert daemon.requests == [Events()]
    if as_json:
        assert [json.loads(line)["kind"] for line in lines] == ["started", "failed"]
        assert json.loads(lines[1]) == {
            "at": 1e9,
            "id": 1,
            "name": "web",
            "kind": "failed",
            "message": "disk /x\x1b[2J\n: gone",
        }
    else:
        assert [line.split(" ", 1)[1] for line in lines] == [
            "1 web started",
            "1 web failed: disk /x\\x1b[2J\\x0a: gone",
        ]


def test_wait_for_a_state(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """The command looks again after each event, and ends at the state."""
    states = iter([State.WAITING, State.WAITING, State.RUNNING])

    def answer(request: AnyRequest) -> list[AnyAnswer]:
        if isinstance(request, Events):
            return [Done(), *[an_event(EventKind.STARTING)] * 5]
        return [Vms(vms=(VmInfo(id=1, name="web", state=next(states), cpus=1, memory=1),))]

    serve(answer)
    assert vmctl(["wait", "--for", "running", "--timeout", "1e300", "web"]) == 0
    assert capsys.readouterr().err == "waiting for vm web: running\n"


@pytest.mark.parametrize(
    ("options", "status", "errors"),
    [
        (["--for", "running", "--timeout", "0"], 124, "waiting for vm web: timed out\n"),
        (["--timeout", "0"], 124, "waiting for vm web: timed out\n"),
        (["--timeout", "1e-3"], 124, "waiting for vm web: timed out\n"),
        (
            ["--for", "walking"],
            1,
            (
                "vmctl: invalid condition: walking (running, stopped, ready, file=path,"
                " port=number, unit=name or console=text)\n"
            ),
        ),
        (["--timeout", "x"], 1, "vmctl: invalid time-out: x: not a number of seconds\n"),
        (["--timeout", "-1"], 1, "vmctl: invalid time-out: -1: not a number of seconds\n"),
        (["--timeout", "nan"], 1, "vmctl: invalid time-out: nan: not a number of seconds\n"),
    ],
)
def test_wait_ends(
    options: list[str], status: int, errors: str, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    """A time-out has its usual status; an impossible wait is a failure."""

    def answer(request: AnyRequest) -> list[AnyAnswer]:
        if isinstance(request, Wait):
            return []
        if isinstance(request, Events):
            return [Done()]
        return [Vms(vms=(DB, VmInfo(id=1, name="web", state=State.PAUSED, cpus=1, memory=1)))]

    serve(answer)
    assert vmctl(["wait", *options, "web"]) == status
    assert capsys.readouterr().err == errors


def test_wait_for_a_vm_that_is_not_there(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """A VM that does not exist counts as stopped, and will not run."""
    serve(lambda request: [Done() if isinstance(request, Events) else Vms(vms=())])
    assert vmctl(["wait", "--for", "stopped", "web"]) == 0
    assert vmctl(["wait", "--for", "running", "web"]) == 1
    assert capsys.readouterr().err == (
        "waiting for vm web: stopped\nwaiting for vm web: \nvmctl: vm not found\n"
    )


def test_top(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """Rates are differences by time; a VM that is new has none."""
    samples = iter(range(1, 10))

    def answer(_: AnyRequest) -> list[AnyAnswer]:
        number = next(samples)
        used = Statistics(cpu_ns=number * 1_000_000_000, disk_read=number << 30)
        return [
            Vms(
                vms=(
                    *((DB,) if number == 1 else ()),
                    replace(WEB, statistics=used),
                )
            )
        ]

    serve(answer)
    assert vmctl(["top", "--json", "-d", "0.1", "-n", "2"]) == 0
    for line in capsys.readouterr().out.splitlines():
        (row,) = json.loads(line)
        assert row["name"] == "web"
        assert 0 < row["cpu"] <= 10
        assert row["disk_read"] == pytest.approx(row["cpu"] * (1 << 30), rel=0.01)
        assert row["net_sent"] == 0
    assert vmctl(["top", "-d", "0.1", "-n", "1"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["ID", "PID", "CPU"]
    assert line.split()[-2:] == ["running", "web"]
    assert vmctl(["top", "-n", "0"]) == 1


@pytest.mark.parametrize(
    ("name", "errors"),
    [
        ("my vm", "invalid VM name"),
        ("-x", None),  # an option
        (".x", "invalid VM name"),
        ("_x", "invalid VM name"),
        ("x/y", "invalid VM name"),
        ("ümlaut", "invalid VM name"),
        ("x\udcff", "invalid VM name"),
        ("a.b_c-9", ""),
    ],
)
def test_names_are_checked_first(
    name: str, errors: str | None, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    """Impossible names are refused in OpenBSD's words, before the daemon is asked."""
    daemon = serve(lambda _: [STARTED])
    assert vmctl(["start", name]) == (0 if errors == "" else 1)
    if errors:
        assert capsys.readouterr().err == f"vmctl: {errors}\n"
    assert len(daemon.requests) == (1 if errors == "" else 0)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("clone web {}", "vm name too long"),
        ("clone web {}%d", "vm name too long"),
        ("clone web a/b", "invalid VM name"),
        ("snapshot web {}", "snapshot name too long"),
        ("snapshot -r {}", "snapshot name too long"),
        ("snapshot --info {}", "snapshot name too long"),
        ("snapshot --check {}", "snapshot name too long"),
        ("start web --from {}", "snapshot name too long"),
        ("start {} --from x", "name too long"),
        ("stop {}", "name too long"),
    ],
)
def test_long_names_are_told_in_words(
    line: str, told: str, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not in those of the protocol, whose messages have limits of their own."""
    daemon = serve(lambda _: [STARTED])
    assert vmctl(line.format("x" * 300).split()) == 1
    assert capsys.readouterr().err.splitlines()[0] == f"vmctl: {told}"
    assert daemon.requests == []


def test_a_dot_is_a_local_interface(serve: Serve) -> None:
    """As in OpenBSD, -L is -n with a dot."""
    daemon = serve(lambda _: [STARTED])
    assert vmctl(["start", "-b", "/etc/passwd", "-n", ".", "-n", "uplink", "x"]) == 0
    (request,) = daemon.requests
    assert isinstance(request, Start)
    assert request.interfaces == (
        InterfaceRequest(is_local=True),
        InterfaceRequest(switch="uplink"),
    )


@pytest.mark.parametrize("options", [[], ["--timeout", "9"]])
def test_wait_in_its_own_words(
    options: list[str], serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wait for a stopped VM fails in its own words, not in those of a stop."""
    serve(lambda _: [failed(ErrorCode.NOT_RUNNING)])
    assert vmctl(["wait", *options, "web"]) == 1
    text = "waiting for vm web: cannot wait for vm that is not running\n"
    assert capsys.readouterr().err == text


def test_a_path_that_is_no_text(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path that JSON cannot hold is refused with a line."""
    path = tmp_path / "vm\udcff.conf"
    path.write_bytes(b"x")
    daemon = serve(lambda _: [STARTED])
    assert vmctl(["load", str(path)]) == 1
    assert vmctl(["pause", "x\udcff"]) == 1
    assert daemon.requests == []
    shown = f"vmctl: not UTF-8: {tmp_path}/vm\\xff.conf\n"
    assert capsys.readouterr().err == f"{shown}vmctl: not UTF-8: x\\xff\n"


def test_who_may_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this user may not use the socket, the message names the group that may."""
    path = tmp_path / "vmd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        path.chmod(0o660)
        group = grp.getgrgid(path.stat().st_gid).gr_name
    lines = advice(str(path), PermissionError(13, "Permission denied"))
    assert lines == [
        f"only root and the group {group} may connect: see 'socket owner' in vm.conf(5)"
    ]
    assert advice(str(tmp_path / "none" / "x"), PermissionError(13, "x")) == []
    for mode, told in ((0o600, "only root may connect"), (0o666, "everybody may connect")):
        path.chmod(mode)
        if os.getuid() == 0:
            assert may_connect(str(path)) == told
    monkeypatch.setenv("VMD_SOCKET", str(path))
    assert vmctl(["status"]) == 1  # no daemon listens
    assert capsys.readouterr().err.splitlines()[1].startswith("vmctl: vmd is not running: ")
    monkeypatch.setenv("VMD_SOCKET", f"{tmp_path}/{'x' * 200}")
    assert vmctl(["status"]) == 1
    assert capsys.readouterr().err.endswith("AF_UNIX path too long\n")
