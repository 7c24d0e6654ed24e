"""The rig's command line, scripts and stages, as far as no boot is needed."""

from __future__ import annotations

import ctypes
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.rig.cli import parse
from tests.rig.machine import (
    Rig,
    Stage,
    build_guard,
    environment_script,
    main_script,
    project_stages,
    qemu_arguments,
    wait,
)
from vmm_kvm.arch.x86.cpuid import KVM_CPUID_FEATURES
from vmm_kvm.kvm import abi


def test_the_command_line_is_read() -> None:
    """Every option lands in its field; memory is given in MiB."""
    rig = parse(
        [
            *("run", "--cpus", "3", "--mem", "512", "--timeout", "7.5"),
            *("--stage", "/etc:*.conf,x", "--out", "here", "--", "ls", "-l"),
        ]
    )
    assert rig == Rig(
        command=("ls", "-l"),
        cpus=3,
        memory=512 << 20,
        timeout_s=7.5,
        stages=(Stage(Path("/etc"), ("*.conf", "x")),),
        out=Path("here"),
    )


def test_the_project_is_staged_first(tmp_path: Path) -> None:
    """A stage that the caller names may lie inside one of the project's."""
    rig = parse(["run", "--project", "--stage", str(tmp_path), "--", "true"])
    assert rig.stages[-1] == Stage(tmp_path)
    assert rig.stages[:-1] == project_stages(Path(__file__).resolve().parents[3])


def test_a_command_is_required() -> None:
    """Without a command there is nothing to run: status 2, as for any usage error."""
    with pytest.raises(SystemExit, match="2"):
        parse(["run"])


def test_the_counted_clock_has_one_processor() -> None:
    """An instruction-counting clock needs a single thread, whatever --cpus says."""
    arguments = qemu_arguments(
        Rig(("true",), cpus=4, is_counted=True), Path("k"), Path("i"), Path("s")
    )
    assert arguments[arguments.index("-smp") + 1] == "1"
    assert arguments[arguments.index("-icount") + 1] == "shift=1,sleep=off"


def test_copies_by_words_take_a_processor_without_fast_strings() -> None:
    """With --copy-words, and only then, the processor has neither ERMS nor FSRM."""
    processors = []
    for options in ([], ["--copy-words"]):
        rig = parse(["run", *options, "--", "true"])
        arguments = qemu_arguments(rig, Path("k"), Path("i"), Path("s"))
        processors.append(arguments[arguments.index("-cpu") + 1])
    assert processors == ["max", "max,erms=off,fsrm=off"]


def test_the_root_is_shared_read_only() -> None:
    """Nothing in the rig can change this machine's files, save in the shared scratch."""
    arguments = qemu_arguments(Rig(("true",)), Path("k"), Path("i"), Path("/scratch"))
    shares = [arguments[i + 1] for i, word in enumerate(arguments) if word == "-virtfs"]
    assert [("path=/," in share, "readonly=on" in share) for share in shares] == [
        (True, True),
        (False, False),
        (False, True),
    ]


def test_the_environment_survives_quoting() -> None:
    """Values with quotes and newlines arrive unchanged; names that no shell knows are left out."""
    odd = 'it\'s "a"\n$HOME `b` \\'
    script = environment_script({"ODD": odd, "BASH_FUNC_x%%": "() { :; }", "PWD": "/"})
    shown = subprocess.run(
        ["/bin/sh", "-c", f'{script}printf %s "$ODD"'], capture_output=True, text=True, check=True
    )
    assert shown.stdout == odd
    assert "BASH_FUNC" not in script
    assert "PWD" not in script


def test_the_main_script_parses_and_quotes() -> None:
    """The command and the directory may hold spaces and quotes."""
    script = main_script(Path("/a b"), ["echo", "it's", "$x"])
    parsed = subprocess.run(
        ["/bin/bash", "-n"], input=script, capture_output=True, text=True, check=False
    )
    assert parsed.stderr == ""
    assert "cd '/a b'\n" in script
    assert """setsid -w echo 'it'"'"'s' '$x'\n""" in script


@pytest.mark.parametrize(("is_counted", "clock"), [(False, "plain"), (True, "counted")])
def test_a_command_is_told_the_clock(is_counted: bool, clock: str) -> None:
    """$RIG says that it is the rig, and which clock the rig has."""
    script = main_script(Path("/"), ["true"], is_counted=is_counted)
    assert f"export RIG={clock} RIG_OUT=" in script


def test_a_folder_is_staged_without_what_is_left_out(tmp_path: Path) -> None:
    """A stage's archive holds the folder without files that match its patterns."""
    folder = tmp_path / "folder"
    (folder / "cache").mkdir(parents=True)
    (folder / "keep.py").touch()
    (folder / "drop.pyc").touch()
    place = tmp_path / "stage-0"
    Stage(folder, ("cache", "*.pyc")).save(place)
    with tarfile.open(place / "tar") as archive:
        assert sorted(archive.getnames()) == [".", "./keep.py"]
    assert (place / "place").read_text() == str(folder)


def test_a_file_is_staged_by_what_it_points_at(tmp_path: Path) -> None:
    """A symbolic link cannot be mounted over, so its target is."""
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("text")
    link.symlink_to(target)
    place = tmp_path / "stage-0"
    Stage(link).save(place)
    assert (place / "place").read_text() == str(target)
    assert (place / "file").read_text() == "text"


def test_a_silent_rig_is_given_up(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Output is passed on as it comes; a rig that is silent for too long is given up."""
    script = "echo one; sleep 0.3; echo two; exec sleep 60"
    with subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert not wait(process, timeout_s=60, patience_s=1, qmp=None)
        process.kill()
    assert capfdbinary.readouterr().out == b"one\ntwo\n"


def test_the_end_of_a_rig_is_seen() -> None:
    """The end of the process ends the wait, with a pipe and without."""
    for stdout in (subprocess.PIPE, None):
        with subprocess.Popen(["/bin/true"], stdout=stdout) as process:
            assert wait(process, timeout_s=60, patience_s=60, qmp=None)


def test_guests_get_no_paravirtual_end_of_interrupt(tmp_path: Path) -> None:
    """The preloaded ioctl removes the feature, and only that, from a vCPU's CPUID."""
    build_guard(tmp_path / "guard.so")
    guard = ctypes.CDLL(str(tmp_path / "guard.so"))
    cpuid = abi.with_entries(abi.kvm_cpuid2, abi.kvm_cpuid_entry2, 2)(nent=2)
    cpuid.entries[0].function, cpuid.entries[0].eax = 0, 0xFFFF_FFFF
    cpuid.entries[1].function, cpuid.entries[1].eax = KVM_CPUID_FEATURES, 0xFFFF_FFFF
    guard.ioctl(ctypes.c_int(-1), ctypes.c_ulong(abi.KVM_SET_CPUID2), ctypes.byref(cpuid))
    assert [hex(entry.eax) for entry in cpuid.entries] == ["0xffffffff", "0xffffffbf"]
