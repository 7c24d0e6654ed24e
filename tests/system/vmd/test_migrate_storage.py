"""VMs that move together with their disks; the other host's files are in another directory."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.filling_guest import small_file_system
from tests.system.vmd.daemon import Daemon, descendants, vm_block
from tests.system.vmd.test_migrate import TIMEOUT_S, Hosts, answers, hosts
from tests.writing_guest import make_disk, written
from vmm_kvm.block.image import Format

pytestmark = pytest.mark.kvm

COPY = "--copy-storage"


def lead(both: Hosts, there: Path, *, script: str = 'exec "$@"') -> None:
    """Show ssh's command the directory `there` where the VM's disks are here."""
    disks = both.directory / "disks"
    unshare = "unshare -m" if os.geteuid() == 0 else "unshare -rm"
    both.leads_by(
        f'exec {unshare} sh -c \'mount --bind "$0" "$1" || exit 9; shift; {script}\''
        f' {there} {disks} sh -c "$*"'
    )


@contextmanager
def apart(directory: Path, *lines: str, seconds: tuple[str, ...] = ()) -> Iterator[Hosts]:
    """Run two daemons, and a VM whose disks, in `disks`, the second does not see."""
    (directory / "there").mkdir()
    with hosts(directory, *lines, seconds=seconds) as both:
        lead(both, directory / "there")
        yield both


def make(directory: Path, name: str, *options: str) -> Path:
    """Make a disk that is not empty; return its path."""
    disks = directory / "disks"
    disks.mkdir(exist_ok=True)
    path, kind = disks / name, name.rpartition(".")[2]
    run("qemu-img", "create", "-q", "-f", kind, *options, str(path), "40M")
    run("qemu-io", "-f", kind, "-c", "write -P 7 1M 3M", "-c", "write -z 2M 64k", str(path))
    return path


def run(*command: str) -> None:
    """Run a command that succeeds, and prints nothing of interest."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S)


def line(disk: Path) -> str:
    """Return the line of vm.conf of a disk."""
    return f'disk "{disk}" format {disk.suffix[1:]}'


def names(directory: Path) -> list[str]:
    """Return what is in a directory, hidden files too."""
    return sorted(path.name for path in directory.iterdir())


def test_disks_go_along(tmp_path: Path) -> None:
    """Raw and qcow2 disks, an overlay among them, have copies there of the same contents."""
    base = make(tmp_path, "base.qcow2")
    over = tmp_path / "disks" / "over.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(over))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 8 30M 128k", str(over))
    disks = [make(tmp_path, "a.raw"), make(tmp_path, "b.qcow2"), over]
    with apart(tmp_path, *map(line, disks)) as both, both.second.client() as there:
        status, said = both.migrated(COPY)
        assert (status, said.splitlines()[-1]) == (0, "vmctl: migrated vm one to second")
        answers(there, "one")
        there.ask("stop", name="one", force=True, wait=True)
    copies = [tmp_path / "there" / disk.name for disk in disks]
    assert names(tmp_path / "there") == sorted(copy.name for copy in copies)
    for disk, copy in zip(disks, copies, strict=True):
        kind = disk.suffix[1:]
        assert copy.stat().st_mode & 0o777 == 0o600
        if kind == "qcow2":
            run("qemu-img", "check", "-q", "-f", kind, str(copy))
        run("qemu-img", "compare", "-q", "-f", kind, "-F", kind, str(disk), str(copy))


def test_a_guest_that_writes(tmp_path: Path) -> None:
    """Every write that the guest has seen succeed is on the copy, or on the disk if cancelled."""
    (tmp_path / "disks").mkdir()
    (tmp_path / "there").mkdir()
    kind = Format.QCOW2
    disk = tmp_path / "disks" / f"disk.{kind}"
    make_disk(disk, kind)
    block = vm_block("one", line(disk), enabled=True).replace(
        next(text for text in vm_block("one").splitlines() if "boot" in text), ""
    )
    places = [tmp_path / name for name in ("first", "second")]
    for place in places:
        place.mkdir()
    with (
        Daemon(places[0], block) as first,
        Daemon(places[1], "") as second,
        first.client() as here,
        second.client() as there,
    ):
        both = Hosts(first, second, tmp_path / "ssh", tmp_path)
        lead(both, tmp_path / "there")
        here.wait_for_state("one", "running")
        with here.console("one") as console:
            console.expect(b"=go=")
        status, said = both.migrated(COPY, "--downtime", "1000")
        assert status == 0, said
        with there.console("one") as console:
            console.expect(b"=go=")  # it writes on, and reports each round
            assert b"=no=" not in console.output
        there.ask("stop", name="one", force=True, wait=True)
    assert written(tmp_path / "there" / disk.name, kind) > written(disk, kind)


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    """A file or symbolic link at the disk's place is refused; the VM runs on here."""
    disk = make(tmp_path, "a.raw")
    other = tmp_path / "there" / "a.raw"
    with apart(tmp_path, line(disk)) as both, both.first.client() as here:
        other.write_bytes(bytes(40 << 20))
        status, said = both.migrated(COPY)
        assert status == 1
        assert f"vmctl: disk {disk}: nobody writes to it: it is not the one that the VM" in said
        assert other.read_bytes() == bytes(40 << 20)
        other.unlink()
        other.symlink_to(tmp_path / "nowhere")
        assert both.migrated(COPY)[0] == 1
        assert names(tmp_path / "there") == ["a.raw"]
        here.wait_for_state("one", "running")
        answers(here, "one")


def test_a_full_disk_there(tmp_path: Path) -> None:
    """If there is no room, one line says so, nothing is left there, and the VM runs on here."""
    disk = make(tmp_path, "a.qcow2")
    with small_file_system(tmp_path / "small") as small, apart(tmp_path, line(disk)) as both:
        lead(both, tmp_path / "small")
        status, said = both.migrated(COPY)
        assert status == 1
        assert f"vmctl: disk {disk}: No space left on device" in said
        assert f"vmctl: the receiver says: disk {disk}: No space left on device" in said
        assert names(small.place) == ["ballast"]
        with both.first.client() as here, both.second.client() as there:
            here.wait_for_state("one", "running")
            answers(here, "one")
            assert there.ask("status")["vms"] == []
        lead(both, tmp_path / "there", script='ulimit -f 1024; exec "$@"')
        status, said = both.migrated(COPY)
        assert (status, f"vmctl: disk {disk}: File too large" in said) == (1, True), said


ENDINGS = [  # ssh, and what it starts, ignore the SIGINT of a terminal
    ("migrate", signal.SIGINT),
    ("receive", signal.SIGTERM),
]


def test_it_is_cancelled(tmp_path: Path) -> None:
    """Whatever ends vmctl, here or there, nothing is left there, and the VM runs on here."""
    disk = make(tmp_path, "a.raw")
    with disk.open("r+b") as file:
        file.seek(8 << 20)
        file.write(os.urandom(32 << 20))
    with (
        apart(tmp_path, line(disk)) as both,
        both.first.client() as here,
        both.second.client() as there,
    ):
        # The receiver gets some of the disk, and no more.
        some = '{ dd bs=64k count=99 status=none; cat > /dev/null; } | "$@"'
        lead(both, tmp_path / "there", script=f"ulimit -c 0; {some}")
        for whose, number in ENDINGS:
            command = both.migrate(COPY)
            deadline = time.monotonic() + TIMEOUT_S
            while not there.ask("status")["vms"]:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.kill(command.pid if whose == "migrate" else receiver(command.pid), number)
            said = command.communicate(timeout=TIMEOUT_S)[1].decode()
            assert command.returncode == (-number if whose == "migrate" else 1), said
            assert "Traceback" not in said
            deadline = time.monotonic() + TIMEOUT_S
            while here.ask("unpause", name="one").get("code") == "EBUSY":
                assert time.monotonic() < deadline
                time.sleep(0.02)
            here.wait_for_state("one", "running")
            answers(here, "one")
            while there.ask("status")["vms"]:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert names(tmp_path / "there") == []


def receiver(pid: int) -> int:
    """Return the process of vmctl on the other host."""
    for each in descendants(pid):
        if "receive" in Path(f"/proc/{each}/cmdline").read_text().split("\0"):
            return each
    raise AssertionError("there is none")
