"""The table of verbs: abbreviations, and the report of misuse."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vmctl.line import options, verbs
from vmctl.line.cli import main, read
from vmctl.line.help import help_text
from vmctl.line.options import Option
from vmctl.line.verbs import VERBS, matches, names, usage

ROOT = Path(__file__).resolve().parents[3]
_MAKERS = (VERBS["run"], VERBS["start"])
_SHARED = ("name", "field", "help", "value", "is_repeated", "completes")
USAGE = "usage:\tvmctl [-v] [-H host] command [arg ...]\n"

WRONG = (
    *("stop", "stop -a web", "start", "start a b", "pause", "pause a b", "load", "reload x"),
    *("reset some", "log", "log x y", "status a b", "console", "wait", "events x", "top x"),
    *("run a b", "create", "create a b", "doctor x", "send", "receive a b", "unpause", "show a b"),
)
OPENBSD = (
    *("console", "create", "load", "log", "pause", "receive", "reload", "reset", "send", "show"),
    *("start", "status", "stop", "unpause", "wait"),
)
SHORTEST = (
    *("co", "cr", "loa", "log", "p", "rec", "rel", "res", "se", "sh", "star", "stat", "sto"),
    *("u", "w"),
)


@pytest.mark.parametrize("line", WRONG)
def test_misuse(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Too many, too few, or wrong words are answered by the usage of the verb alone."""
    assert main(line.split()) == 1
    shown = usage(VERBS[line.split(maxsplit=1)[0]]) + "\n"
    assert capsys.readouterr() == ("", shown)


def test_an_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown option is named, with the usage of the verb."""
    assert main(["pause", "-x", "web"]) == 1
    assert capsys.readouterr().err == "vmctl: no such option: -x\nusage:\tvmctl [-v] pause id\n"


@pytest.mark.parametrize("word", ["", "sta", "st", "s", "re", "lo", "c", "r"])
def test_ambiguous_prefixes(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Prefixes that OpenBSD calls ambiguous are so here."""
    assert main([word]) == 1
    assert capsys.readouterr().err == f"ambiguous argument: {word}\n{USAGE}"


def test_openbsd_has_its_verbs() -> None:
    """The table marks OpenBSD's verbs, and no others."""
    assert tuple(name for name, verb in VERBS.items() if verb.is_openbsd) == OPENBSD


@pytest.mark.parametrize(("word", "name"), list(zip(SHORTEST, OPENBSD, strict=True)))
def test_shortest_prefixes(word: str, name: str) -> None:
    """OpenBSD's shortest prefixes mean the same here, whatever verbs of ours start with them."""
    ours = dict.fromkeys((f"{word}x", "waiting", "pull", "restore", "resume", "upload"), False)
    assert matches(word, names() | ours) == [name]


COMING = ("snapshot", "clone", "migrate", "exec", "cp", "ssh", "list", "metrics", "web", "gdb")
"""Possible later verbs, none of which may change the meaning of a word today."""
LETTERS = sorted({name[:size] for name in names() for size in range(1, len(name) + 1)})


@pytest.mark.parametrize("word", LETTERS)
def test_every_prefix(word: str) -> None:
    """OpenBSD's verbs come first, whole names and prefixes; ours only if none of them matches.

    The same holds with later verbs, unless one of them is the only match.
    """
    openbsd = [name for name in OPENBSD if name.startswith(word)]
    known = names() | dict.fromkeys(COMING, False)
    if openbsd and word not in names():
        assert matches(word, names()) == matches(word, known) == openbsd
    elif word in names():
        assert matches(word, names()) == matches(word, known) == [word]
    else:
        ours = [name for name in names() if name.startswith(word)]
        assert matches(word, names()) == ours
        assert set(matches(word, known)) >= set(ours)


@pytest.mark.parametrize(
    ("word", "name"), [("run", "run"), ("ru", "run"), ("t", "top"), ("d", "doctor"), ("h", "help")]
)
def test_prefixes_of_ours(word: str, name: str) -> None:
    """If no verb of OpenBSD's starts with it, a prefix means one of ours."""
    assert matches(word, names()) == [name]


def test_a_whole_name_is_that_verb() -> None:
    """A whole name that another verb starts with, OpenBSD's or ours, is not ambiguous."""
    known = {"log": True, "login": True, "run": False, "runner": False}
    assert [matches(word, known) for word in known] == [[word] for word in known]


def test_verbose_comes_first() -> None:
    """-v comes before the verb, once or more often, and is none of its options."""
    assert [read(line.split()).is_verbose for line in ("status", "-v status", "-vv -v status")] == [
        *(False, True, True)
    ]


@pytest.mark.parametrize("name", sorted(VERBS))
def test_usage_has_every_option(name: str) -> None:
    """The usage of a verb shows all of its options, and no others."""
    text = VERBS[name].usage or usage(VERBS[name]).partition(name)[2]
    long = set(re.findall(r"--[\w-]+", text))
    short = {f"-{one}" for group in re.findall(r"(?<![\w-])-(\w+)", text) for one in group}
    assert long | short == {option.name for option in VERBS[name].taken}


def test_status_is_light(tmp_path: Path) -> None:
    """On a pipe `status` imports none of the libraries, nor the hypervisor."""
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
    assert "vmctl.daemon.status" in modules
    heavy = {"typer", "msgspec", "rich", "asyncio", "dataclasses", "inspect", "logging"}
    assert {name for name in modules if name.split(".")[0] in heavy} == set()
    hypervisor = {name for name in modules if name.split(".")[0] == "vmm_kvm"}
    words = {f"vmm_kvm.{name}" for name in ("bits", "limits", "record", "standard_streams", "text")}
    assert hypervisor == {"vmm_kvm", *words}
    assert done.stderr.startswith(f"vmctl: connect: {tmp_path}/none: No such file or directory\n")


def test_verbs_import_nothing() -> None:
    """The table imports next to nothing."""
    assert _imports(verbs) == ["collections.abc", "vmctl.line.options"]
    assert _imports(options) == ["collections.abc"]


def _imports(module: ModuleType) -> list[str]:
    source = Path(str(module.__file__)).read_text()
    return re.findall(r"^(?:from|import) (\S+)", source, re.MULTILINE)


def test_run_and_start_have_the_same_options() -> None:
    """Both take the same options; what one cannot do it refuses, with the reason."""
    run, start = ({one.name: one for one in VERBS[name].options} for name in ("run", "start"))
    assert run.keys() == start.keys()
    assert (run.pop("--tpm").value, start.pop("--tpm").value) == ("directory", "")
    for name, option in run.items():
        ours, other = ([getattr(one, each) for each in _SHARED] for one in (option, start[name]))
        assert ours == other
        assert not (option.refused and start[name].refused)
    refused = {verb.name: {one.name for one in verb.options if one.refused} for verb in _MAKERS}
    assert refused == {
        "run": {"--clock", "--save", "--template", "-t"},
        "start": {
            "--console-log",
            "--gdb",
            "--no-reboot",
            "--nvram",
            "--rw",
            "--virtio-console",
        },
    }


@pytest.mark.parametrize(
    ("verb", "option"),
    [(verb.name, one) for verb in VERBS.values() for one in verb.options if one.refused],
)
def test_refused_options(verb: str, option: Option, capsys: pytest.CaptureFixture[str]) -> None:
    """A refusal is one line with the reason; neither help nor usage has the option."""
    assert main([verb, option.name, "x", "y"]) == 1
    line = f"vmctl: {option.name} is not for {verb}: {option.refused}\n"
    assert capsys.readouterr() == ("", line)
    assert f" {option.name} " not in help_text(verb)
