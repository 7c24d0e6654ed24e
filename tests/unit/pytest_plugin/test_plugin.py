"""The pytest plugin in runs without machines, and its parts that need none."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmm_pytest.console import LOG_MAX, ConsoleError, ConsoleLog
from vmm_pytest.run import NoMachinesError, Run, RunError

ROOT = Path(__file__).resolve().parents[3]
LOADED = """
import pytest, sys
before = set(sys.modules)
import vmm_pytest.plugin
print(*sorted(set(sys.modules) - before))
"""


def test_its_import_is_light() -> None:
    """Every run of pytest imports it: of this tree, two modules and nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["vmm_pytest", "vmm_pytest.plugin"]


def test_a_run_without_machines(tmp_path: Path) -> None:
    """A test passes, and nothing of the daemon or its clients is loaded."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (tmp_path / "test_it.py").write_text(
        "import sys\n"
        "def test_it(tmp_path):\n"
        "    assert not [name for name in sys.modules if name.startswith(('vmctl', 'vmd'))]\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--strict-markers", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if "PYTEST" not in name},
        check=False,
        capture_output=True,
        text=True,
    )
    assert "1 passed" in done.stdout, done.stdout
    assert done.returncode == 0


ASKED = """
import json, os, pathlib
import pytest

@pytest.fixture(scope="session")
def vm_run():
    return None

class Template:
    def clone(self, on_made):
        return None

@pytest.fixture(scope="session")
def vm_template():
    def make(**settings):
        with pathlib.Path(os.environ["ASKED"]).open("a") as file:
            file.write(json.dumps(settings) + "\\n")
        return Template()
    return make
"""
ASKING = """
import pytest

@pytest.mark.vm(memory="16M")
class TestOfOptions:
    def test_it(self, vm): pass

    @pytest.mark.vm(append="near", cpus=2)
    def test_its_own_command_line(self, vm): pass

    @pytest.mark.vm(kernel="own", image="disk")
    def test_its_own_kernel(self, vm): pass

    @pytest.mark.vm(append="near")
    def test_keywords(self, vm_factory):
        vm_factory(append="nearer")
        vm_factory(kernel="own")
"""
OF_OPTIONS = {"image": "i", "kernel": "k", "initrd": "r", "append": "a b"}


def test_what_describes_a_machine(tmp_path: Path) -> None:
    """All options count where no marker names a kernel; else neither its RAM disk nor its words."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text(ASKED)
    (tmp_path / "test_it.py").write_text(ASKING)
    asked = tmp_path / "asked"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
            *(f"--vm-{name}={value}" for name, value in OF_OPTIONS.items()),
        ],
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if "PYTEST" not in name},
            "ASKED": str(asked),
        },
        check=False,
        capture_output=True,
        text=True,
    )
    assert "4 passed" in done.stdout, done.stdout
    assert [json.loads(line) for line in asked.read_text().splitlines()] == [
        {"memory": "16M", **OF_OPTIONS},
        {"memory": "16M", **OF_OPTIONS, "append": "near", "cpus": 2},
        {"memory": "16M", "kernel": "own", "image": "disk"},
        {"memory": "16M", **OF_OPTIONS, "append": "nearer"},
        {"memory": "16M", "image": "i", "kernel": "own", "append": "near"},
    ]


def test_a_host_without_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no machines, unless a daemon is named."""
    monkeypatch.setattr("vmm_pytest.run._KVM", str(tmp_path / "kvm"))
    with pytest.raises(NoMachinesError, match="kvm: No such file or directory"):
        Run("one")
    assert Run("one", "vmd.sock").daemon == str(Path.cwd() / "vmd.sock")


@pytest.mark.parametrize(("options", "told"), [((), "1 skipped"), (("--vm-require",), "1 error")])
def test_a_test_without_kvm(tmp_path: Path, options: tuple[str, ...], told: str) -> None:
    """It is skipped, with the reason; with --vm-require it is an error."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text("import vmm_pytest.run\nvmm_pytest.run._KVM = '/none'\n")
    (tmp_path / "test_it.py").write_text("def test_it(vm): pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *options],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if "PYTEST" not in name},
        check=False,
        capture_output=True,
        text=True,
    )
    assert f"= {told} in" in done.stdout, done.stdout
    assert "/none: No such file or directory" in done.stdout


def test_processes_of_a_run_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same identifier leads to the same folder and names of its own; none, to another run."""
    monkeypatch.setattr("vmm_pytest.run._KVM", os.devnull)
    one, two, other = Run("x"), Run("x"), Run()
    assert one.folder == two.folder
    assert one.folder != other.folder
    names = {run.new_name() for run in (one, two, other) for _ in range(2)}
    assert len(names) == 6
    assert all(name.startswith(one.name) for name in (one.new_name(), two.new_name()))


def test_a_folder_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link, or a file, where the folder would be is refused."""
    monkeypatch.setattr("vmm_pytest.run._KVM", os.devnull)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = Run("x")
    run.folder.symlink_to(tmp_path)
    with pytest.raises(RunError, match="not a directory of ours"), run:
        pass


def test_a_console() -> None:
    """Each search begins after the one before; kept output is bounded; an end is an end."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    console = ConsoleLog(near)
    with far:
        far.send(b"one two one\r\n")
        end = time.monotonic() + 60
        assert [console.wait_for("o(n)e", end) for _ in range(2)] == ["one", "one"]
        with pytest.raises(TimeoutError, match="has not shown 'one'"):
            console.wait_for("one", time.monotonic())
        console.send("typed")
        assert far.recv(100) == b"\0typed"
        for _ in range(LOG_MAX // 4096):
            far.send(b"x" * 4096)
        far.send(b"\xffend")
        assert console.wait_for("end$", end) == "end"
        text = console.text()
        assert text.startswith("[17 bytes before]\nxxx")
        assert text.endswith("x\N{REPLACEMENT CHARACTER}end")
    with pytest.raises(ConsoleError, match="the console has ended, and has not shown 'never'"):
        console.wait_for("never", end)
    console.close()
