"""Every verb under every condition that a shell, a terminal and a locale can cause.

The command lines are made from the table of verbs. Commands run two at a time.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest

from tests.agents import Vsock
from tests.closed_streams import closing
from tests.unit.vmctl.conftest import Serve
from tests.unit.vmctl.fake_daemon import Answers, FakeDaemon
from tests.vmctl_driver import VMCTL
from vmctl.line.options import FILE, VM
from vmctl.line.verbs import VERBS, Verb
from vmd.wire.messages import (
    AnyRequest,
    Console,
    ConsoleOpened,
    Counts,
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
    Status,
    Terminated,
    Totals,
    VmInfo,
    Vms,
    Wait,
)
from vmd.wire.parts import Statistics
from vmd.wire.transfers import Clone, Cloned, ClonedVm

TIMEOUT_S = 60
NAMES = tuple(f"build-runner-integration-{number:02}" for number in range(1, 13))
TROUBLE = re.compile(r"Traceback|Exception|Error:|^  File ", re.MULTILINE)
STYLE = re.compile(r"\x1b\[[0-9;]*m")


LINES = {
    "clone": "clone 1 web%d",
    "connect": "connect {vsock} 7",
    "console": "console 1",
    "cp": "cp {here}/disk.qcow2 {vsock}:{new}",
    "create": "create -s 1M {new}",
    "exec": "exec {vsock} -- true",
    "help": "help start",
    "image pull": "image pull http://127.0.0.1:1/web.img",
    "image resize": "image resize {new} 4M",
    "load": "load {here}/vm.conf",
    "log": "log verbose",
    "migrate": "migrate --ssh true web second",
    "receive": "receive web",
    "run": "run -b {here}/none",
    "ssh": "ssh --ssh true {vsock}",
    "start": "start web",
    "top": "top -d 0.1 -n 2",
    "web": "web --port 65536",
}
"""Command lines of verbs that need more than the table of verbs; `{here}` is a folder with
images in it, `{new}` the name of a missing file, `{vsock}` the path to a guest."""
FAILS = {"events", "gdb", "image pull", "image resize", "image rm", "receive", "run", "web"}
"""The daemon ends, there is no such image, server, kernel or port, no stream to receive, or no
stream to debug by."""
OPERANDS = {VM: "1", FILE: "{here}/disk.qcow2"}


class Line(NamedTuple):
    """A command line, and its status without a disturbance."""

    words: str
    status: int
    prints: bool
    """Whether it has a result on standard output."""


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    output: str
    errors: str


def vms() -> Vms:
    """Return twelve VMs with names that start alike."""
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
    """Do the request."""
    match request:
        case Status():
            return [vms()]
        case Counts():
            totals = Totals(
                starts=1,
                failed_starts=0,
                start_seconds=0.5,
                start_bounds=(0.1, 1.0),
                start_counts=(0, 1, 0),
            )
            return [totals]
        case Start():
            return [Started(id=7, pid=700, tty="/dev/pts/7")]
        case Clone():
            return [Cloned(vms=(ClonedVm(name="web1", id=8, pid=800, tty="/dev/pts/8"),))]
        case Wait():
            return [Terminated(id=1)]
        case Events():
            event = Event(kind=EventKind.STARTED, id=1, name="web", at=1e9)
            return [Done(), event, Failed(code=ErrorCode.EINTR)]
        case Console(id=7777):  # again, after its end
            return [Failed(code=ErrorCode.NOT_RUNNING)]
        case Console():
            theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.send(b"login: ")
            ours.close()
            return [(ConsoleOpened(id=7777, tty="/dev/pts/7"), [theirs.detach()])]
        case _:
            return [Done(id=1)]


def lines_of(verb: Verb) -> Iterator[str]:
    """Yield command lines of a verb, made from the table: a new verb has them by itself.

    They are its work, its help, its result as JSON, and a mistake.
    """
    operand = next((OPERANDS[one] for one in verb.completes if one in OPERANDS), "web")
    count = max(verb.least, int(VM in verb.completes))
    does = LINES.get(verb.name) or " ".join((verb.name, *([operand] * count)))
    yield does
    yield f"{verb.name} --help"
    if "--json" in {option.name for option in verb.taken}:
        yield does.replace(verb.name, f"{verb.name} --json", 1)
    yield f"{verb.name} --mistaken"


@contextmanager
def place(folder: Path) -> Iterator[dict[str, str]]:
    """Make a folder with a disk image, and run a daemon that does each request.

    Yields the environment that names it.
    """
    socket_path = folder / "vmd.sock"
    with FakeDaemon(socket_path, answer), Vsock(folder / "vsock", {7: ["true"]}):
        image = folder / "disk.qcow2"
        subprocess.run([VMCTL, "create", "-s", "4M", image], check=True, capture_output=True)
        yield {"VMD_SOCKET": str(socket_path), "VMCTL_IMAGES": str(folder / "images")}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a disk image in it, with the daemon that commands find."""
    with place(tmp_path) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield tmp_path


_number = itertools.count()


def words_of(line: str, here: Path) -> list[str]:
    """Return the words of a command line, with a new folder for it below this one."""
    own = here / str(next(_number))
    if "{here}" in line or "{new}" in line:
        own.mkdir()
    if "disk.qcow2" in line:
        shutil.copy(here / "disk.qcow2", own)
    places = {"here": own, "new": own / "new.img", "vsock": here / "vsock"}
    return [word.format_map(places) for word in line.split()]


Given = TypeVar("Given")
Made = TypeVar("Made")


def two_at_a_time(work: Callable[[Given], Made], given: Iterable[Given]) -> list[Made]:
    """Return `work` of each item, in order; two run at a time, on any machine."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, given))


def run(arguments: Sequence[str | Path], **environment: str) -> Ended:
    """Run a command with pipes; bytes that are no UTF-8 become surrogates."""
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
    """Run a command on a terminal of its own, with a pipe for standard error."""
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


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    """All command lines of all verbs, and their ends with pipes."""
    folder = tmp_path_factory.mktemp("plain")

    def line(words: str) -> Line:
        ended = run([VMCTL, *words_of(words, folder)], **environment)
        assert ended.status in {0, 1}, (words, ended)
        assert not TROUBLE.search(ended.errors + ended.output), (words, ended)
        return Line(words, ended.status, bool(ended.output))

    with place(folder) as environment:
        return two_at_a_time(line, [one for verb in VERBS.values() for one in lines_of(verb)])


def without_help(lines: list[Line]) -> list[Line]:
    """Leave out requests for help, and mistakes."""
    return [line for line in lines if not line.words.endswith(("--help", "--mistaken"))]


def test_plain(lines: list[Line]) -> None:
    """Help goes to standard output, mistakes do not; each verb works, except failing ones.

    A host may lack parts: doctor may have either status.
    """
    by_words = {line.words: line for line in lines}
    for name, verb in VERBS.items():
        does, shows_help, *_, is_wrong = (by_words[words] for words in lines_of(verb))
        assert shows_help[1:] == (0, True)
        assert is_wrong[1:] == (1, False)
        if name != "doctor":
            assert (name, does.status) == (name, int(name in FAILS))


def _closed(fds: str) -> Callable[[Sequence[str | Path]], Ended]:
    return lambda arguments: run(closing(fds, arguments))


def _redirected(redirection: str) -> Callable[[Sequence[str | Path]], Ended]:
    shell = ("/bin/sh", "-c", f'exec "$@" {redirection}', "sh")
    return lambda arguments: run([*shell, *arguments])


CONDITIONS: dict[str, Callable[[Sequence[str | Path]], Ended]] = {
    "not a terminal": run,
    "stdin closed": _closed("0"),
    "stdin full": _redirected("</dev/full"),
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
NOT_FOR_PEOPLE = {"send"}
"""Its output is no text: it refuses to write that to a terminal."""
LOST = {"stdout closed", "all closed", "stdout full"}
OF_OUTPUT = {"stdout closed", "stdout full", "stderr full", "20 columns", "LC_ALL=C"}
"""Conditions that matter for help and mistakes too."""


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions(condition: str, here: Path, lines: list[Line]) -> None:
    """Each verb ends with its status and no traceback; a lost result is one line and status 1."""

    def is_right(line: Line) -> str:
        ended = CONDITIONS[condition]([VMCTL, *words_of(line.words, here)])
        is_lost = line.prints and condition in LOST
        is_text = line.prints or line.words.split()[0] not in NOT_FOR_PEOPLE
        is_refused = condition.endswith("columns") and not is_text
        told = ended.errors.count("vmctl: standard output: ")
        wrong = (
            ended.status != (1 if is_lost or is_refused else line.status)
            or TROUBLE.search(ended.errors + ended.output)
            or told != int(is_lost and "all" not in condition)
        )
        return f"{line}: {ended}" if wrong else ""

    tried = lines if condition in OF_OUTPUT else without_help(lines)
    assert [wrong for wrong in two_at_a_time(is_right, tried) if wrong] == []


def test_names_that_are_no_text(here: Path, lines: list[Line]) -> None:
    """A name that is not UTF-8 is at most an error of the name, and is shown with escapes."""
    bad = os.fsdecode(b"\xff\xfe\x1b[2J")
    escaped = "\\xff\\xfe\\x1b[2J"

    def is_right(line: Line) -> str:
        given = words_of(line.words, here)
        words = [given[0], *(_renamed(word, bad) for word in given[1:])]
        ended = run([VMCTL, *words], LC_ALL="C.UTF-8")
        text = ended.errors + ended.output
        wrong = ended.status not in {0, 1} or TROUBLE.search(text) or bad in text
        is_shown = line.words.startswith("image") and len(words) == 3 and bad in words[2]
        if is_shown and line.status == 0:
            shown = (ended, on_terminal([VMCTL, *words], 80), run([VMCTL, *words], LC_ALL="C"))
            wrong = wrong or any(one.status or escaped not in one.output for one in shown)
        return f"{words}: {ended}" if wrong else ""

    assert [wrong for wrong in two_at_a_time(is_right, without_help(lines)) if wrong] == []


def _renamed(word: str, bad: str) -> str:
    """Return a word of a command line with a name that is no text; a file is renamed."""
    if word in {"1", "web"}:
        return bad
    path = Path(word)
    if not path.is_absolute():
        return word
    new = path.with_name(f"{bad}{path.suffix}")
    if path.exists():
        path.rename(new)
    return str(new)


@pytest.mark.parametrize("columns", [20, 80, 200])
@pytest.mark.parametrize("words", ["status", "show 1", "top -d 0.1 -n 1"])
def test_tables_are_never_cropped(words: str, columns: int, here: Path) -> None:
    """Ids, pids, states and names are never cut, on a terminal of any width."""
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


def test_a_terminal_costs_no_library(here: Path) -> None:
    """A table on a terminal imports no more libraries than `status` on a pipe."""
    del here
    program = (
        "import sys\nfrom vmctl.__main__ import main\ntry: main()\nexcept SystemExit: pass\n"
        "sys.stderr.write(' '.join(sys.modules))"
    )
    ended = on_terminal([sys.executable, "-c", program, "status"], 80)
    modules = set(ended.errors.split())
    assert NAMES[0] in ended.output
    assert "vmctl.screen.table" in modules
    heavy = {"rich", "typer", "msgspec", "asyncio", "dataclasses", "inspect", "logging"}
    assert {name for name in modules if name.split(".")[0] in heavy} == set()


def _wait_until_ours(pid: int) -> bool:
    """Wait until Python's own handler of SIGINT is replaced; False if the process has ended.

    Before that ^C reaches Python's handler, which prints a traceback.
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
def test_interrupts(moment: int, here: Path, lines: list[Line]) -> None:
    """^C ends each verb by SIGINT, silently, at any moment."""

    def is_right(line: Line) -> str:
        with subprocess.Popen(
            [VMCTL, *words_of(line.words, here)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            if _wait_until_ours(process.pid):
                # Not a wait for anything: a moment during its work.
                with subprocess.Popen(["sleep", str(moment * 0.006)]) as sleep:
                    sleep.wait()
                process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=TIMEOUT_S)
        wrong = process.returncode not in {-signal.SIGINT, line.status} or TROUBLE.search(errors)
        return f"{line.words}: {process.returncode} {errors}" if wrong else ""

    assert [wrong for wrong in two_at_a_time(is_right, without_help(lines)) if wrong] == []


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
    """A verb that waits for the daemon dies of ^C at once, without further output."""
    daemon = serve(lambda request: [Done()] if isinstance(request, Events) else [])
    with subprocess.Popen(
        [VMCTL, *words.split()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not daemon.requests:
                assert time.monotonic() < deadline
                os.sched_yield()
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert (process.returncode, output) == (-signal.SIGINT, "")
    assert errors in {"", "waiting for vm web: ", "stopping vm web: "}
