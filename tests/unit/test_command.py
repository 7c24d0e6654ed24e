"""The command line itself: verbs, prefixes, misuse, the manual, and its imports."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vmctl.line.cli import main
from vmctl.line.verbs import VERBS, usage

ROOT = Path(__file__).resolve().parents[2]
MANUAL = (ROOT / "man" / "vmctl.8").read_text()
USAGE = "usage:\tvmctl [-v] [-H host] command [arg ...]\n"
IMAGE_USAGE = "".join(
    f"{usage(verb)}\n" for name, verb in sorted(VERBS.items()) if name.startswith("image ")
)


def loaded_modules(*arguments: str) -> set[str]:
    """Run vmctl in an interpreter of its own; return the top-level modules that it loaded."""
    program = (
        "import sys\nfrom vmctl.line.cli import main\n"
        f"try: main({list(arguments)!r})\nexcept SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], USAGE),
        (["frobnicate"], "unknown argument: frobnicate\n" + USAGE),
        (["-x"], "vmctl: no such option: -x\n" + USAGE),
        (["-vx"], "vmctl: no such option: -vx\n" + USAGE),
        (["-"], "vmctl: no such option: -\n" + USAGE),
        (["run", "-Z"], f"vmctl: no such option: -Z\n{usage(VERBS['run'])}\n"),
        (["run", "-m"], f"vmctl: option '-m' requires an argument\n{usage(VERBS['run'])}\n"),
        (
            ["run", "--no-reboot=1"],
            f"vmctl: option '--no-reboot' does not take a value\n{usage(VERBS['run'])}\n",
        ),
        (["doctor", "extra"], "usage:\tvmctl [-v] doctor [--json]\n"),
        (["create"], "usage:\tvmctl [-v] create [-b base | -i disk] [-s size] disk\n"),
        (
            ["image"],
            IMAGE_USAGE,
        ),
        (["image", "info"], "usage:\tvmctl [-v] image info [--json] disk\n"),
        (
            ["image", "inof", "x"],
            f"unknown argument: inof\ndid you mean info?\n{IMAGE_USAGE}",
        ),
        (["help", "start", "x"], "usage:\tvmctl [-v] help [command]\n"),
        (["help", "frobnicate"], "unknown argument: frobnicate\n" + USAGE),
    ],
)
def test_misuse(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Misuse is status 1 with OpenBSD's texts, on standard error alone."""
    assert main(arguments) == 1
    assert ("", error) == tuple(capsys.readouterr())


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("strat", "start"),
        ("satrt", "start"),
        ("stauts", "status"),
        ("creat", None),  # a prefix
        ("cerate", "create"),
        ("unpuase", "unpause"),
        ("dotcor", "doctor"),
        ("q", None),
        ("xyzzy", None),
        ("lgo", "log"),
    ],
)
def test_typing_errors(word: str, meant: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """A second line suggests the one verb that a mistyped word is near to."""
    main([word])
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "mean" in line] == (
        [f"did you mean {meant}?"] if meant else []
    )


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("run --timout 5", "--timeout"),
        ("run --slftest", "--selftest"),
        ("start --fimrware x y", "--firmware"),
        ("wait --four x y", "--for"),
    ],
)
def test_typing_errors_of_options(
    line: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second line suggests the one option that a mistyped one is near to."""
    assert main(line.split()) == 1
    assert capsys.readouterr().err.splitlines()[1] == f"did you mean {meant}?"


@pytest.mark.parametrize(
    ("lines", "has", "lacks"),
    [
        (("--help", "-h", "help", "-v --help", "-h x"), ("doctor", "image info"), ("--json",)),
        (
            ("doc --help", "help doc", "he doctor", "doctor -h"),
            ("can run VMs", "--json"),
            ("-v]\n",),
        ),
        (("image --help", "help image", "im -h"), ("image info", "image check"), ("doctor",)),
        (("image info -h", "help im inf"), ("what a disk image is",), ("check",)),
        (("run -m 1G -h", "ru --help x y z"), ("--nvram path", "--timeout seconds"), ("doctor",)),
        (
            ("stop -fh", "sto -h"),
            ("usage:\tvmctl [-v] stop [-fw] [--json] [id | -a]\n",),
            ("status",),
        ),
    ],
)
def test_help(
    lines: tuple[str, ...],
    has: tuple[str, ...],
    lacks: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Help is on standard output, for a verb, for a group of verbs, or for all."""
    for line in lines:
        assert main(line.split()) == 0
        output, errors = capsys.readouterr()
        assert errors == ""
        assert [text for text in has if text not in output] == []
        assert [text for text in lacks if text in output] == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The version is that of pyproject.toml."""
    assert main(["--version"]) == 0
    wanted = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert wanted
    assert capsys.readouterr().out == f"vmctl {wanted[1]}\n"


def _manual_sections() -> dict[str, list[str]]:
    """Return the manual's section of each verb, which may have several forms."""
    begin = MANUAL.index("The commands are as follows")
    text = MANUAL[begin : MANUAL.index("\nWhere an\n.Ar id", begin)]
    parts = re.split(r"^\.It (?:Xo )?Cm ((?:image )?[\w-]+)", text, flags=re.MULTILINE)
    found: dict[str, list[str]] = {}
    for name, section in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(name, []).append(section)
    return found


def _options_told(text: str) -> set[str]:
    """Return the options that a section of the manual has."""
    head, _, body = text.partition("\n")
    if ".Xc" in text:
        head, _, body = text.partition(".Xc")
    told = re.findall(r"Fl (-?[\w-]+)", head)
    told += re.findall(r"^\.It Fl (-?[\w-]+)", body, re.MULTILINE)
    long = {f"-{one}" for one in told if one.startswith("-")}
    return long | {f"-{letter}" for one in told if not one.startswith("-") for letter in one}


def test_manual_has_every_verb_and_option() -> None:
    """The manual has the verbs of the table, in its order, and each with the same options."""
    sections = _manual_sections()
    assert list(sections) == sorted(VERBS)
    for name, texts in sections.items():
        told = set().union(*map(_options_told, texts))
        assert told == {option.name for option in VERBS[name].taken}, name


def test_every_verb_has_its_function() -> None:
    """The function in the table of each verb exists."""
    for verb in VERBS.values():
        module = importlib.import_module(f"vmctl.{verb.module}")
        assert callable(getattr(module, verb.function)), verb.name


def test_help_is_light() -> None:
    """Help in a pipe loads neither the hypervisor nor typer."""
    modules = loaded_modules("run", "--help")
    assert "vmctl.line.cli" in modules
    heavy = {"vmm_kvm", "rich", "asyncio", "typer", "inspect", "json"}
    assert not {name for name in modules if name.split(".")[0] in heavy}


def test_images_are_light(tmp_path: Path) -> None:
    """Information on images, and new images, need neither typer, rich nor logging."""
    image = tmp_path / "disk.qcow2"
    heavy = {"rich", "asyncio", "typer", "inspect", "json", "logging", "pathlib", "dataclasses"}
    for arguments in (["create", "-s", "1M", str(image)], ["image", "info", str(image)]):
        modules = loaded_modules(*arguments)
        assert "vmm_kvm.images.opening" in modules
        assert not {name for name in modules if name.split(".")[0] in heavy}


def test_run_is_light() -> None:
    """A run imports no codec that its kernel does not need, no rich, no asyncio, no pyroute2."""
    modules = loaded_modules("run", "-b", "/nonexistent")
    assert "vmm_kvm.machine" in modules
    heavy = {"rich", "asyncio", "zstandard", "lz4", "pyroute2", "msgspec", "json"}
    assert not {name for name in modules if name.split(".")[0] in heavy}


def test_the_machine_is_light() -> None:
    """Running a guest imports nothing that generates code, and no unused logging."""
    program = "import sys, vmctl.foreground.run; print(*sys.modules)"
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = {"typer", "dataclasses", "inspect", "pathlib", "logging"}
    assert heavy.isdisjoint(done.stdout.split())


def test_a_reader_that_goes_away_is_no_error_of_ours() -> None:
    """If `head -0` leaves output unread, vmctl ends quietly."""
    program = (
        "import os, sys\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
        "import vmctl.__main__ as command\nsys.argv = ['vmctl', *sys.argv[1:]]\ncommand.main()"
    )
    for arguments in (["doctor", "--json"], ["--help"], ["--version"]):
        words = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
        assert (done.returncode, done.stderr) == (1, "")
