"""Every verb under every condition that a shell, a terminal and a locale can bring about."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.closed_streams import closing
from tests.unit.vmctl.conftest import Serve
from tests.unit.vmctl.fake_daemon import Answers
from tests.vmctl_driver import VMCTL
from vmctl.verbs import VERBS
from vmd.wire.messages import (
    AnyRequest,
    Console,
    ConsoleOpened,
    Done,
    ErrorCode,
    Event,
    EventKind,
    Events,
    Failed,
    InterfaceInfo,
    Start,
    Started,
    State,
    Statistics,
    Status,
    Terminated,
    VmInfo,
    Vms,
    Wait,
)

TIMEOUT_S = 60
NAMES = tuple(f"build-runner-integration-{number:02}" for number in range(1, 13))
TROUBLE = re.compile(r"Traceback|Exception|Error:|^  File ", re.MULTILINE)
STYLE = re.compile(r"\x1b\[[0-9;]*m")


class Case(NamedTuple):
    """A command line of a verb that does all it can."""

    words: str
    """`{here}` is a folder with images in it."""
    status: int = 0
    prints: bool = False
    """Whether it has a result on standard output."""


CASES = {
    "console": Case("console 1", 0, prints=True),
    "create": Case("create -s 1M {here}/new.img"),
    "doctor": Case("doctor", prints=True),
    "events": Case("events", 1, prints=True),
    "help": Case("help start", prints=True),
    "image check": Case("image check {here}/disk.qcow2", prints=True),
    "image info": Case("image info {here}/disk.qcow2", prints=True),
    "load": Case("load {here}/vm.conf"),
    "log": Case("log verbose"),
    "pause": Case("pause 1"),
    "receive": Case("receive web", 1),
    "reload": Case("reload"),
    "reset": Case("reset"),
    "run": Case("run -b {here}/none", 1),
    "send": Case("send 1", 1),
    "show": Case("show 1", prints=True),
    "start": Case("start web"),
    "status": Case("status", prints=True),
    "stop": Case("stop 1"),
    "top": Case("top -d 0.1 -n 2", prints=True),
    "unpause": Case("unpause 1"),
    "wait": Case("wait 1"),
}


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    output: str
    errors: str


def vms() -> Vms:
    """Return twelve VMs with names that begin alike."""
    return Vms(
        vms=tuple(
            VmInfo(
                id=number,
                name=name,
                state=State.RUNNING,
                cpus=1,
                memory=1 << 30,
                memory_used=270 << 20,
                pid=15380 + number,
                tty=f"/dev/pts/{number}",
                statistics=Statistics(),
                interfaces=(InterfaceInfo(lladdr="fe:e1:bb:d1:00:01", tap="tap0"),),
            )
            for number, name in enumerate(NAMES, 1)
        )
    )


def answer(request: AnyRequest) -> Answers:
    """Do what is asked."""
    match request:
        case Status():
            return [vms()]
        case Start():
            return [Started(id=7, pid=700, tty="/dev/pts/7")]
        case Wait():
            return [Terminated(id=1)]
        case Events():
            event = Event(kind=EventKind.STARTED, id=1, name="web", at=1e9)
            return [Done(), event, Failed(code=ErrorCode.EINTR)]
        case Console():
            theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.send(b"login: ")
            ours.close()
            return [(ConsoleOpened(id=7777, tty="/dev/pts/7"), [theirs.detach()])]
        case _:
            return [Done(id=1)]


@pytest.fixture
def here(tmp_path: Path, serve: Serve) -> Path:
    """A folder with images in it; the daemon that VMD_SOCKET names does what is asked."""
    consoles = iter(range(1000))

    def once(request: AnyRequest) -> Answers:
        # The console of a VM is there once in two times: then it has ended.
        if isinstance(request, Console) and next(consoles) % 2:
            return [Failed(code=ErrorCode.NOT_RUNNING)]
        return answer(request)

    serve(once)
    subprocess.run(
        [VMCTL, "create", "-s", "4M", tmp_path / "disk.qcow2"], check=True, capture_output=True
    )
    return tmp_path


@pytest.fixture(scope="module")
def doctor() -> int:
    """The status of `vmctl doctor` here, which depends on the host."""
    done = subprocess.run([VMCTL, "doctor"], capture_output=True, check=False)
    return done.returncode


def words_of(case: Case, here: Path) -> list[str]:
    """Return the command line, for images of this folder."""
    (here / "new.img").unlink(missing_ok=True)
    return [word.format(here=here) for word in case.words.split()]


def run(arguments: Sequence[str | Path], **environment: str) -> Ended:
    """Run a command with pipes; what is no UTF-8 is kept as Python does."""
    done = subprocess.run(
        arguments,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        env={**os.environ, **environment},
        check=False,
        timeout=TIMEOUT_S,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def on_terminal(arguments: Sequence[str | Path], columns: int, rows: int = 40) -> Ended:
    """Run a command on a terminal of its own, but for standard error, which is a pipe."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    with subprocess.Popen(
        arguments,
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as process:
        os.close(slave)
        output = b""
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # the other side is gone
                break
            if not data:
                break
            output += data
        assert process.stderr
        errors = process.stderr.read().decode(errors="surrogateescape")
        status = process.wait(TIMEOUT_S)
    os.close(master)
    text = output.decode(errors="surrogateescape").replace("\r\n", "\n")
    return Ended(status, text, errors)


def all_cases(doctor: int) -> Iterator[tuple[str, Case]]:
    """Yield each verb with its case; that of doctor has the status it has here."""
    for name, case in CASES.items():
        yield name, case._replace(status=doctor) if name == "doctor" else case


def test_every_verb_has_a_case() -> None:
    """No verb is left out."""
    assert list(CASES) == sorted(VERBS)


def _closed(fds: str) -> Callable[[Sequence[str | Path]], Ended]:
    return lambda arguments: run(closing(fds, arguments))


def _redirected(redirection: str) -> Callable[[Sequence[str | Path]], Ended]:
    shell = ("/bin/sh", "-c", f'exec "$@" {redirection}', "sh")
    return lambda arguments: run([*shell, *arguments])


CONDITIONS: dict[str, Callable[[Sequence[str | Path]], Ended]] = {
    "not a terminal": run,
    "stdin closed": _closed("0"),
    "stdout closed": _closed("1"),
    "stderr closed": _closed("2"),
    "all closed": _closed("012"),
    "stdout full": _redirected(">/dev/full"),
    "stderr full": _redirected("2>/dev/full"),
    "20 columns": lambda arguments: on_terminal(arguments, 20),
    "80 columns": lambda arguments: on_terminal(arguments, 80),
    "200 columns": lambda arguments: on_terminal(arguments, 200),
    "no columns": lambda arguments: on_terminal(arguments, 0, 0),
    "LC_ALL=C": lambda arguments: run(arguments, LC_ALL="C"),
    "LC_ALL=POSIX, UTF-8 off": lambda arguments: run(
        arguments, LC_ALL="POSIX", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0"
    ),
}
LOST = {"stdout closed", "all closed", "stdout full"}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions(condition: str, here: Path, doctor: int) -> None:
    """Each verb ends with its status and no traceback; a lost result is one line and status 1."""
    wrong = []
    for name, case in all_cases(doctor):
        ended = CONDITIONS[condition]([VMCTL, *words_of(case, here)])
        is_lost = case.prints and condition in LOST
        status = 1 if is_lost else case.status
        told = ended.errors.count("vmctl: standard output: ")
        expected = int(is_lost and "all" not in condition)
        if (
            ended.status != status
            or TROUBLE.search(ended.errors + ended.output)
            or told != expected
        ):
            wrong.append((name, ended))
    assert wrong == []


def test_names_that_are_no_text(here: Path, doctor: int) -> None:
    """A name that is not UTF-8 is an error of the name at most, and is shown by escapes."""
    bad = os.fsdecode(b"\xff\xfe\x1b[2J")
    disk = here / f"{bad}.qcow2"
    (here / "disk.qcow2").rename(disk)
    wrong = []
    for name, case in all_cases(doctor):
        words = words_of(case, here)
        words[1:] = [
            str(disk) if "disk.qcow2" in word else bad if word in {"1", "web"} else word
            for word in words[1:]
        ]
        ended = run([VMCTL, *words], LC_ALL="C.UTF-8")
        if ended.status not in {0, 1} or TROUBLE.search(ended.errors):
            wrong.append((name, ended))
        if name.startswith("image"):
            shown = (ended, on_terminal([VMCTL, *words], 80), run([VMCTL, *words], LC_ALL="C"))
            assert [one.status for one in shown] == [0, 0, 0]
            assert [one for one in shown if "\\xff\\xfe\\x1b[2J" not in one.output] == []
    assert wrong == []


@pytest.mark.parametrize("columns", [20, 80, 200])
@pytest.mark.parametrize("words", ["status", "show 1", "top -d 0.1 -n 1"])
def test_tables_are_never_cropped(words: str, columns: int, here: Path) -> None:
    """Ids, pids, states and names are whole, however narrow the terminal is."""
    del here
    ended = on_terminal([VMCTL, *words.split()], columns, rows=400)
    assert ended.status == 0
    lines = [line.split() for line in STYLE.sub("", ended.output).splitlines()]
    assert lines[0][0] == "ID"
    assert lines[0][-2:] == ["STATE", "NAME"]
    shown = NAMES[:1] if words.startswith("show") else NAMES
    for number, name in enumerate(shown, 1):
        assert lines[number][:2] == [str(number), str(15380 + number)]
        assert lines[number][-2:] == ["running", name]


def _wait_until_ours(pid: int) -> bool:
    """Wait until Python's own handler of SIGINT was there and is replaced; False if it has ended.

    Before that ^C is Python's, which prints a traceback.
    """
    bit = 1 << (signal.SIGINT - 1)
    was_there = False
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        if "\nState:\tZ" in text:
            return False
        found = re.search(r"^SigCgt:\t(\w+)$", text, re.MULTILINE)
        assert found
        is_there = bool(int(found[1], 16) & bit)
        if was_there and not is_there:
            return True
        was_there = was_there or is_there
    raise AssertionError("SIGINT is never ours")


@pytest.mark.parametrize("moment", range(10))
def test_interrupts(moment: int, here: Path, doctor: int) -> None:
    """^C ends each verb by SIGINT, in silence, at whatever moment it comes."""
    wrong = []
    for name, case in all_cases(doctor):
        with subprocess.Popen(
            [VMCTL, *words_of(case, here)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            if _wait_until_ours(process.pid):
                # Not a wait for anything: a moment in the midst of what it does.
                with subprocess.Popen(["sleep", str(moment * 0.006)]) as sleep:
                    sleep.wait()
                process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=TIMEOUT_S)
        if process.returncode not in {-signal.SIGINT, case.status} or TROUBLE.search(errors):
            wrong.append((name, process.returncode, errors))
    assert wrong == []


@pytest.mark.parametrize(
    "words",
    [
        "events",
        "top",
        "wait web",
        "wait --for running web",
        "stop -w web",
        "wait --for console=x web",
    ],
)
def test_waiting_is_interrupted(words: str, serve: Serve) -> None:
    """What waits for the daemon dies of ^C at once, without a word more than it had said."""
    daemon = serve(lambda request: [Done()] if isinstance(request, Events) else [])
    with subprocess.Popen(
        [VMCTL, *words.split()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + TIMEOUT_S
        while not daemon.requests:
            assert time.monotonic() < deadline
            os.sched_yield()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, output) == (-signal.SIGINT, "")
    assert errors in {"", "waiting for vm web: ", "stopping vm web: "}
