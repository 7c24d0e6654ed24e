"""Standard streams that are closed or full, for whole programs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.closed_streams import COMBINATIONS, run_closed
from tests.vmctl_driver import ROOT, VMCTL

PYTHON = sys.executable
# Writes to a file, its first open one, where each descriptor and stream leads.
PROBE = """
import json, os, sys
from vmm_kvm.standard_streams import run_program

def body():
    with open(sys.argv[1], "w") as file:
        told = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)}
        kept = [os.get_inheritable(fd) for fd in range(3)]
        streams = [stream.fileno() for stream in (sys.stdin, sys.stdout, sys.stderr)]
        json.dump([file.fileno(), told, kept, streams, sys.stdin.read()], file)
    return 7

run_program("probe", body)
"""


def redirected(redirection: str, *arguments: str | Path) -> tuple[int, str, str]:
    """Run a program with a redirection of the shell; returns status, output and errors."""
    words = [str(argument) for argument in arguments]
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *words],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "VMD_SOCKET": "/nonexistent"},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("closed", COMBINATIONS)
def test_closed_descriptors_are_opened_first(closed: str, tmp_path: Path) -> None:
    """Each closed one of 0 to 2 becomes /dev/null, and is inherited; no file gets its number."""
    report = tmp_path / "report"
    assert run_closed(closed, [PYTHON, "-c", PROBE, report]) == (7, "", "")
    first, told, kept, streams, read = json.loads(report.read_text())
    assert first > 2
    for fd in closed:
        assert told[fd] == "/dev/null"
    assert (kept, streams, read) == ([True] * 3, [0, 1, 2], "")


def test_a_result_that_cannot_be_written() -> None:
    """A result that cannot be written is one line and status 1, at any write or the last flush."""
    for size in (1, 1 << 20):
        text = f"def body():\n    print('x' * {size})\n    return 0\nrun_program('probe', body)"
        program = f"from vmm_kvm.standard_streams import run_program\n{text}"
        for redirection, why in (
            (">/dev/full", "No space left on device"),
            (">&-", "Bad file descriptor"),
        ):
            assert redirected(redirection, PYTHON, "-c", program) == (
                *(1, ""),
                f"probe: standard output: {why}\n",
            )


def test_a_bug_keeps_its_traceback() -> None:
    """An unexpected error has its whole traceback, even if the output is lost."""
    program = "from vmm_kvm.standard_streams import run_program\nrun_program('p', lambda: [][0])"
    status, _, errors = redirected(">/dev/full", PYTHON, "-c", program)
    assert status == 1
    assert errors.endswith("IndexError: list index out of range\n")


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_messages_come_at_once(options: list[str]) -> None:
    """A line on standard error appears at once, not when the program ends."""
    program = (
        "import os, sys\nfrom vmm_kvm.standard_streams import run_program\n"
        "run_program('p', lambda: print('said', file=sys.stderr) or os._exit(3))"
    )
    assert redirected("", PYTHON, *options, "-c", program) == (3, "", "said\n")


def test_a_non_blocking_output_is_waited_for() -> None:
    """A pipe that another program made non-blocking still gets all output."""
    program = (
        "import os\nfrom vmm_kvm.standard_streams import run_program\n"
        "os.set_blocking(1, False)\nrun_program('p', lambda: print('x' * 300000) or 0)"
    )
    status, output, errors = redirected("", PYTHON, "-c", program)
    assert (status, len(output), errors) == (0, 300001, "")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A qcow2 image."""
    path = tmp_path / "disk.qcow2"
    assert redirected("", VMCTL, "create", "-s", "4M", path)[0] == 0
    return path


PRINTING = (
    *(["--help"], ["run", "--help"], ["create", "--help"], ["status", "--help"]),
    *(["image", "info", "IMAGE"], ["image", "info", "--json", "IMAGE"]),
    *(["image", "check", "IMAGE"], ["doctor"], ["doctor", "--json"]),
)


@pytest.mark.parametrize("words", PRINTING, ids=" ".join)
@pytest.mark.parametrize(
    ("redirection", "why"),
    [
        (">/dev/full", "No space left on device"),
        ("<&- >&-", "Bad file descriptor"),
    ],
)
def test_verbs_whose_output_is_lost(
    words: list[str], redirection: str, why: str, image: Path
) -> None:
    """If its output is lost, each verb says so in one line, with status 1."""
    arguments = [str(image) if word == "IMAGE" else word for word in words]
    assert redirected(redirection, VMCTL, *arguments) == (
        *(1, ""),
        f"vmctl: standard output: {why}\n",
    )


@pytest.mark.parametrize("words", PRINTING, ids=" ".join)
def test_verbs_that_nobody_reads(words: list[str], image: Path) -> None:
    """If the reader has left, the status is 1 without a message."""
    arguments = [str(image) if word == "IMAGE" else word for word in words]
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    done = subprocess.run(
        [VMCTL, *arguments], stdout=write_fd, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write_fd)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["status"], 1),
        (["frobnicate"], 1),
        (["create", "x"], 1),
        (["pause", "-x", "web"], 1),
        (["image", "info", "IMAGE"], 0),
        (["image", "check", "IMAGE"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "2>&- <&-"])
def test_lost_messages_change_no_status(
    words: list[str], status: int, redirection: str, image: Path
) -> None:
    """If standard error fails its messages are lost, and do not go to standard output."""
    arguments = [str(image) if word == "IMAGE" else word for word in words]
    got, output, errors = redirected(redirection, VMCTL, *arguments)
    assert (got, errors) == (status, "")
    assert "vmctl" not in output


def create_all(closed: str, place: Path) -> dict[str, bytes]:
    """Make images of every kind with these descriptors closed; returns them by their names."""
    place.mkdir()
    (place / "source.img").write_bytes(bytes(range(256)) * 8192)
    for words in (
        ["-s", "2M", "base.qcow2"],
        ["-s", "3M", "empty.img"],
        ["-b", "base.qcow2", "overlay.qcow2"],
        ["-i", "source.img", "copy.img"],
        ["-i", "source.img", "copy.qcow2"],
    ):
        kind = "raw" if words[-1].endswith("img") else "qcow2"
        errors = "" if "2" in closed else f"vmctl: {kind} imagefile created\n"
        assert run_closed(closed, [VMCTL, "create", *words], cwd=place) == (0, "", errors)
    return {path.name: path.read_bytes() for path in place.iterdir()}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Images of every kind, made with every descriptor open."""
    return create_all("", tmp_path_factory.mktemp("open") / "images")


@pytest.mark.parametrize("closed", ["0", "1", "2", "012"])
def test_create_with_closed_descriptors(
    closed: str, images: dict[str, bytes], tmp_path: Path
) -> None:
    """An image is the same, byte for byte, with any descriptors closed at its making."""
    made = create_all(closed, tmp_path / "images")
    assert [name for name in images if made[name] != images[name]] == []


@pytest.mark.parametrize(
    "arguments",
    [
        [PYTHON, "-m", "vmm_kvm.commands.vmm_blk", "--print-capabilities"],
        [PYTHON, "-m", "vmm_kvm.commands.vmm_net", "--help"],
        [PYTHON, "-m", "vmm_pytest.virt_server", "--help"],
        [PYTHON, "scripts/protocol.py"],
        [PYTHON, "scripts/demo.py", "--help"],
        [PYTHON, "scripts/structure.py"],
        [PYTHON, "scripts/dependencies.py", "debian"],
        [PYTHON, "scripts/install.py", "--help"],
        [PYTHON, "scripts/deb.py", "--help"],
        [PYTHON, "-m", "vmd", "--version"],
    ],
    ids=lambda words: " ".join(words[1:]),
)
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_other_programs(arguments: list[str], redirection: str) -> None:
    """Our other programs do as vmctl does."""
    status, output, errors = redirected(redirection, *arguments)
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert ": standard output: " in errors


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([PYTHON, "vmm_agent/agent.py", "--mistaken"], 2),
        ([PYTHON, "vmm_agent/agent.py", "--unix", "/nonexistent/agent"], 1),
        ([PYTHON, "-m", "vmm_pytest.virt_server", "--socket", "/nonexistent"], 16),
        ([PYTHON, "-m", "vmm_pytest.virt_server", "--mistaken"], 2),
        ([PYTHON, "-m", "vmm_kvm.commands.vmm_blk", "--socket-path=/nonexistent/s", "/none"], 1),
        ([PYTHON, "-m", "vmm_kvm.commands.vmm_net", "--mistaken"], 2),
        ([PYTHON, "-m", "vmd", "--mistaken"], 1),
        ([PYTHON, "scripts/dependencies.py", "mistaken"], 2),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else None,
)
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&- <&-", ">/dev/full 2>/dev/full"])
def test_other_programs_whose_messages_are_lost(
    arguments: list[str], status: int, redirection: str
) -> None:
    """Each program of ours keeps its status if no message can be written."""
    assert redirected(redirection, *arguments) == (status, "", "")


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_vmd_whose_messages_are_lost(redirection: str, tmp_path: Path) -> None:
    """A check of a configuration keeps its status, and writes its messages into no file."""
    config = tmp_path / "vm.conf"
    for text, expected in (("", 0), ("nonsense\n", 1)):
        config.write_text(text)
        status, output, errors = redirected(redirection, PYTHON, "-m", "vmd", "-n", "-f", config)
        assert (status, output, errors) == (expected, "", "")
        assert config.read_text() == text
