"""The two ways to read a command line: the short one, and typer's, which must agree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tests.unit.vmctl.conftest import Serve
from vmctl import verbs
from vmctl.cli import app, main
from vmctl.verbs import OTHERS, VERBS, perform, read_verb
from vmd.wire.messages import AnyAnswer, AnyRequest, Done, ErrorCode, Failed, Status, Vms

ROOT = Path(__file__).resolve().parents[3]
USAGE = "usage:\tvmctl [-v] command [arg ...]\n"

PLAIN = (
    *("status", "status -r", "stat --json", "sh web", "start web", "start -m 1G -d /etc/passwd x"),
    *("star -LL -i 3 -n a -n b -r /etc/passwd x", "start -t base -d /etc/passwd y"),
    *("stop -a", "stop -fw -a", "sto -f web", "stop web", "p web", "un 7", "w web", "loa /x"),
    *("rel", "res", "reset all", "log verb", "sen x", "rec x", "wait --timeout 5 x"),
)
WRONG = (
    *("stop", "stop -a web", "start", "start a b", "pause", "pause a b", "load", "reload x"),
    *("reset some", "log", "log x", "status a b", "console", "wait", "events x", "top x"),
)
RARE = ("stop -x y", "-v status", "start -m1G -d /etc/passwd x", "status --help", "st", "", "run x")


def outcome(
    arguments: list[str], *, plainly: bool, capsys: pytest.CaptureFixture[str]
) -> tuple[int | None, str, str]:
    """Run a command in one of the two ways; returns status and output."""
    if plainly:
        read = read_verb(arguments)
        status = perform(*read) if read else None
    else:
        status = main(arguments)
    return (status, *capsys.readouterr())


@pytest.mark.parametrize("line", PLAIN)
def test_both_ways_are_one(line: str, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """The short way asks the same, and says the same, as typer's."""

    def answer(request: AnyRequest) -> list[AnyAnswer]:
        if isinstance(request, Status):
            return [Vms(vms=())]
        return [Failed(code=ErrorCode.EPERM)] if request.serial > 1 else [Done(id=1)]

    if line.startswith("star"):  # a start is not answered so
        daemon = serve(lambda _: [Failed(code=ErrorCode.EALREADY)])
    else:
        daemon = serve(answer)
    short = outcome(line.split(), plainly=True, capsys=capsys)
    asked = list(daemon.requests)
    daemon.requests.clear()
    assert short == outcome(line.split(), plainly=False, capsys=capsys)
    assert short[0] is not None
    assert daemon.requests == asked


@pytest.mark.parametrize("line", WRONG)
def test_misuse(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The short way leaves misuse to typer, which shows how the verb is used."""
    assert outcome(line.split(), plainly=True, capsys=capsys)[0] is None
    verb = line.split(maxsplit=1)[0]
    shown = f"usage:\tvmctl [-v] {verb} {VERBS[verb].usage}".rstrip() + "\n"
    assert outcome(line.split(), plainly=False, capsys=capsys) == (1, "", shown)


@pytest.mark.parametrize("line", RARE)
def test_what_is_rare_is_typers(line: str) -> None:
    """Options in front, joined values, help: the short way does not read them."""
    assert read_verb(line.split()) is None


def test_an_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    """It is named, with the usage of the verb."""
    assert main(["pause", "-x", "web"]) == 1
    assert capsys.readouterr().err == ("vmctl: no such option: -x\nusage:\tvmctl [-v] pause id\n")


@pytest.mark.parametrize("word", ["sta", "st", "s", "re", "lo", "c", "r", "w", "co", "cr", "rel"])
def test_prefixes(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenBSD's shortest forms are unique here too, and what it calls ambiguous is."""
    matches = [name for name in (*VERBS, *OTHERS) if name.startswith(word)]
    if word in {"w", "co", "cr", "rel"}:
        assert len(matches) == 1
    else:
        assert len(matches) > 1
        assert main([word]) == 1
        assert capsys.readouterr().err == f"ambiguous argument: {word}\n{USAGE}"


def test_every_verb_is_declared() -> None:
    """Typer knows the same verbs and options."""
    commands = getattr(typer.main.get_command(app), "commands", {})
    assert set(commands) == {*VERBS, *OTHERS}
    for name, verb in VERBS.items():
        declared = {option for one in commands[name].params for option in one.opts}
        known = {*verb.flags, *verb.values}
        assert {one for one in declared if one.startswith("-")} - {"-h", "--help"} == known
        mentioned = set(re.findall(r"(?<![\w-])--?[\w]+", verb.usage))
        letters = {
            f"-{letter}" for group in re.findall(r"\[-(\w+)\]", verb.usage) for letter in group
        }
        assert {one for one in mentioned if one.startswith("--")} | letters | {
            one for one in mentioned if len(one) == 2
        } == known


def test_status_is_light(tmp_path: Path) -> None:
    """On a pipe it loads none of the libraries, nor the hypervisor."""
    program = "import sys\nfrom vmctl.__main__ import main\ntry: main()\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}print(*sys.modules)", "status"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"VMD_SOCKET": str(tmp_path / "none"), "PATH": "/usr/bin:/bin"},
    )
    modules = set(done.stdout.split())
    assert "vmctl.status" in modules
    heavy = {"typer", "msgspec", "rich", "asyncio", "dataclasses", "inspect", "logging"}
    assert {name for name in modules if name.split(".")[0] in heavy} == set()
    hypervisor = {name for name in modules if name.split(".")[0] == "vmm_kvm"}
    assert hypervisor == {"vmm_kvm", "vmm_kvm.standard_streams"}
    assert done.stderr == f"vmctl: connect: {tmp_path}/none: No such file or directory\n"


def test_verbs_import_nothing() -> None:
    """The table costs next to nothing to load."""
    source = Path(verbs.__file__).read_text()
    imported = re.findall(r"^(?:from|import) (\S+)", source, re.MULTILINE)
    assert imported == ["collections.abc", "typing"]
