"""Relative paths: they begin where the user is, and lead nowhere if that directory is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vmd.config.check import check
from vmd.config.host import SystemHost
from vmm_kvm.absolute import absolute

ROOT = Path(__file__).resolve().parents[2]
GONE = "the working directory has been removed"
REMOVING = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'


def run_in_no_directory(tmp_path: Path, module: str, *words: str) -> tuple[int, str]:
    """Run a program of ours in a directory that has been removed; return status and errors."""
    done = subprocess.run(
        ["sh", "-c", REMOVING, "sh", sys.executable, "-m", module, *words],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "VMD_SOCKET": str(tmp_path / "none"),
            "STATE_DIRECTORY": str(tmp_path),
            "LC_ALL": "C.UTF-8",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("module", "words", "expected"),
    [
        ("vmd", "-n --user -f vm.conf", "vmd: failed to open vm.conf: No such file or directory"),
        ("vmd", "-n --user -f ./../vm.conf", "vmd: failed to open ./../vm.conf: No such file"),
        ("vmd", "-d --user -f /dev/null --socket s", f"vmd: --socket s: {GONE}"),
        ("vmd", "--user -f /dev/null --socket ./s", f"vmd: --socket ./s: {GONE}"),
        ("vmctl", "load vm.conf", f"vmctl: failed to open vm.conf: {GONE}"),
        ("vmctl", "load ../vm.conf", f"vmctl: failed to open ../vm.conf: {GONE}"),
        ("vmctl", "run -d a.img", f"vmctl: a.img: {GONE}"),
        ("vmctl", "run -b kernel", "vmctl: kernel: No such file or directory"),
        ("vmctl", "start -d a.img x", "vmctl: invalid disk path: a.img: No such file"),
        ("vmctl", "start -b kernel x", "vmctl: invalid boot image path: kernel: No such file"),
        ("vmctl", "run --selftest --vsock s", "vmctl: s: No such file or directory"),
        ("vmctl", "image info a.img", "vmctl: a.img: No such file or directory"),
        ("vmctl", "create -s 1M a.img", "vmctl: create imagefile operation failed: "),
    ],
)
def test_a_directory_that_is_gone(tmp_path: Path, module: str, words: str, expected: str) -> None:
    """A relative path is one line and status 1, with its subject, and no number of the system."""
    status, errors = run_in_no_directory(tmp_path, module, *words.split())
    assert status == 1
    assert errors.splitlines()[-1].startswith(expected), errors
    assert "Traceback" not in errors
    assert "[Errno" not in errors


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("directory", "Is a directory"),
        ("directory/", "Is a directory"),
        (".", "Is a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("dangling", "No such file or directory"),
        ("none", "No such file or directory"),
        ("", "No such file or directory"),
        ("file/", "Not a directory"),
        ("file/below", "Not a directory"),
        ("socket", "No such device or address"),
        ("large", "File too large"),
        ("/dev/zero", "File too large"),
        ("/proc/self/mem", "Input/output error"),
        ("n" * 300, "File name too long"),
    ],
)
def test_what_is_no_configuration(tmp_path: Path, name: str, why: str) -> None:
    """A path that leads to no text is told with the reason, also one that a file includes."""
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("")
    with (tmp_path / "large").open("wb") as large:
        large.truncate(5 << 20)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    host = SystemHost(str(tmp_path))
    lines, status = check(name, {}, host=host)
    assert (lines, status) == ([f"vmd: failed to open {name}: {why}"], 1)
    (tmp_path / "vm.conf").write_text(f'include "{name}"\n')
    lines, status = check("vm.conf", {}, host=host)
    assert status == 1
    assert lines[0].startswith(f"vmd: vm.conf:1: failed to include file {name}: ")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (bytes(100), 'f:1: syntax error near "\\x00"'),
        (b"\x7fELF\x02\x01\x01", 'f:1: syntax error near "\\x7f"'),
        (b"\xff\xfev\0m\0", "f:1: syntax error at the byte 0xff, which is in no word"),
        (b'vm "a" {\r\n}\r\n', "f:1: syntax error at a carriage return: the file has the line"),
        (b"#!/bin/sh\nexec vmd\n", 'f:2: syntax error near "vmd"'),
        (b"<html>\n", 'f:1: syntax error near "<"'),
        (b"{}\n", 'f:1: syntax error near "{"'),
        (b'vm "a\n', "f:1: reached end of file while parsing quoted string"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, data: bytes, line: str) -> None:
    """Another file is refused where it stops being a configuration."""
    (tmp_path / "f").write_bytes(data)
    lines, status = check("f", {}, host=SystemHost(str(tmp_path)))
    assert status == 1
    assert lines[0].startswith(f"vmd: {line}"), lines


@pytest.mark.parametrize("data", [b"", b"\n\n", b"# nothing\n", b"\xef\xbb\xbf# nothing", b"#"])
def test_empty_configurations(tmp_path: Path, data: bytes) -> None:
    """A file that is there and says nothing is right; so is one without a last newline."""
    (tmp_path / "f").write_bytes(data)
    assert check("f", {}, host=SystemHost(str(tmp_path))) == (["configuration OK"], 0)


def test_an_empty_name_is_not_the_default_file(tmp_path: Path) -> None:
    """`vmd -f ""`, of a script whose variable is unset, does not read another configuration."""
    (tmp_path / "vm.conf").write_text("")
    for options in (["-n"], ["-d", "--socket", "s"]):
        done = subprocess.run(
            [sys.executable, "-m", "vmd", "--user", *options, "-f", ""],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert "failed to open : No such file or directory" in done.stderr


def test_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is made absolute, and not shortened; an empty one is none."""
    monkeypatch.chdir(tmp_path)
    assert absolute("a/../b/") == f"{tmp_path}/a/../b/"
    monkeypatch.chdir("/")
    assert absolute("a") == "/a"
    with pytest.raises(FileNotFoundError):
        absolute("")
