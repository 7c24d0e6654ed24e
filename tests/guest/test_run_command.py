"""`vmctl run -- command`: this host's root in a guest, under a layer in memory or as it is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import artifacts
from tests.vmctl_driver import VMCTL

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(900)]

COMMAND_S = 400.0


def run(
    *words: str | Path, command: str, folder: Path, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run a shell command in a guest, from `folder`."""
    kernel = artifacts.kernel("cloud")
    return subprocess.run(
        [VMCTL, "run", "-b", kernel.vmlinuz, *words, "--", "sh", "-c", command],
        cwd=folder,
        input=stdin,
        capture_output=True,
        timeout=COMMAND_S,
        check=False,
    )


def test_a_command_on_the_hosts_root(tmp_path: Path) -> None:
    """Its streams are apart, its status comes back, its directory is ours; its writes are not."""
    (tmp_path / "here").write_text("from the host\n")
    command = (
        "cat here; cat; uname -r; hostname; echo bad >&2; echo new >new; cat new;"
        " touch /usr/written && echo written; grep -c . /proc/mounts >/dev/null && exit 42"
    )
    done = run(command=command, folder=tmp_path, stdin=b"typed\n")
    release = artifacts.kernel("cloud").release
    lines = ["from the host", "typed", release, "vmctl", "new", "written"]
    assert (done.returncode, done.stderr) == (42, b"bad\n")
    assert done.stdout.decode().splitlines() == lines
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert not Path("/usr/written").exists()


def test_a_command_that_may_write(tmp_path: Path) -> None:
    """With --rw the host gets the command's writes; a signal's status is as in a shell."""
    done = run("--rw", command="echo new >new; mkdir d; kill -9 $$", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (137, b"", b"")
    assert (tmp_path / "new").read_text() == "new\n"
    assert (tmp_path / "d").is_dir()
