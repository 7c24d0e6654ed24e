"""Snapshots of VMs by vmctl, in the daemon's store and in files; VMs that start from them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.campaigns import kill_snapshot
from tests.counting_guest import counting_guest
from tests.filling_guest import small_file_system
from tests.system.vmd.daemon import Daemon, is_alive, vm_block
from tests.system.vmd.test_send import running, started
from tests.vmctl_driver import VMCTL
from vmm_kvm.snapshot.file import SnapshotFile

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]
TIMEOUT_S = 120
_AT = 0x3000  # address of the counting guest's counters
_HEAD = struct.Struct("<8sIIQQQ32s")


def vmctl(vmd: Daemon, *words: str) -> tuple[int, str]:
    """Run vmctl; return its exit status and its output."""
    done = subprocess.run(
        [VMCTL, *words],
        env={**os.environ, "VMD_SOCKET": str(vmd.socket)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.returncode, done.stdout


def stored(vmd: Daemon) -> list[Path]:
    """Return all files of the store."""
    return sorted((vmd.socket.parent / "state" / "snapshots").glob("*/*"))


def test_a_vm_is_made_of_a_snapshot_again_and_again(start_vmd: Start) -> None:
    """The source runs on, each copy continues from the snapshot, and all of them answer."""
    with (
        start_vmd(vm_block("one", enabled=True)) as vmd,
        vmd.client() as client,
        vmd.client() as listener,
    ):
        pid = started(vmd, "one")
        assert listener.ask("events")["type"] == "done"
        assert vmctl(vmd, "snapshot", "one", "first") == (
            0,
            "vmctl: made snapshot first of vm 1\n",
        )
        event = listener.receive()[0]
        assert (event["kind"], event["name"], event["message"]) == ("snapshot", "one", "first")
        running(vmd, "one")
        assert client.vm("one")["pid"] == pid
        for name in ("two", "three"):
            status, text = vmctl(vmd, "start", name, "--from", "first")
            told = f"vmctl: started vm {client.vm(name)['id']} successfully"
            assert (status, text[: len(told)]) == (0, told)
            running(vmd, name)
        running(vmd, "one")
        # They keep the file even when its name is gone.
        assert vmctl(vmd, "snapshot", "-r", "first") == (0, "")
        assert stored(vmd) == []
        running(vmd, "three")


def test_a_snapshot_in_a_file(start_vmd: Start, tmp_path: Path) -> None:
    """A user's file appears when it is complete; a VM starts from it, also without the daemon."""
    path = tmp_path / "file"
    with start_vmd(vm_block("one", enabled=True)) as vmd:
        started(vmd, "one")
        assert vmctl(vmd, "snapshot", "-o", str(path), "one")[0] == 0
        assert path.stat().st_mode & 0o777 == 0o600
        assert vmctl(vmd, "snapshot", "-o", str(path), "one") == (
            1,
            f"vmctl: {path}: File exists\n",
        )
        assert vmctl(vmd, "start", "two", "--from", str(path), "--clock", "now")[0] == 0
        running(vmd, "two")
        status, text = vmctl(vmd, "snapshot", "--check", str(path), "--json")
        facts = json.loads(text)
        assert (status, facts["vm"], facts["memory"]) == (0, "one", 64 << 20)
    run = [str(VMCTL), "run", "--from", str(path), "--timeout", "60"]
    done = subprocess.run(run, input=b"ep", capture_output=True, check=False)
    assert (done.stderr, done.returncode, done.stdout[:1]) == (b"", 0, b"e")


def test_the_foreground_maps_a_snapshot(start_vmd: Start, tmp_path: Path) -> None:
    """`run --from` serves the VM's disk itself, so that its memory is the file's, not a copy."""
    disk, path = tmp_path / "disk.raw", tmp_path / "file"
    disk.write_bytes(bytes(1 << 20))
    with start_vmd(vm_block("one", f'disk "{disk}" format raw', enabled=True)) as vmd:
        started(vmd, "one")
        assert vmctl(vmd, "snapshot", "--no-disks", "-o", str(path), "one")[0] == 0
    for _ in range(2):
        with subprocess.Popen(
            [VMCTL, "run", "--from", path, "--timeout", "60"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as program:
            assert program.stdin
            assert program.stdout
            program.stdin.write(b"e")
            program.stdin.flush()
            assert program.stdout.read(1) == b"e"
            process = Path(f"/proc/{program.pid}")
            lines = (process / "maps").read_text().splitlines()
            (line,) = (one for one in lines if one.endswith(f" {path}"))
            assert line.split()[1] == "rw-p"
            assert (process / f"task/{program.pid}/children").read_text() == ""
            program.stdin.write(b"p")
            program.stdin.close()
            assert program.wait(TIMEOUT_S) == 0


def test_a_vm_goes_back_to_a_snapshot(start_vmd: Start, tmp_path: Path) -> None:
    """A stopped VM continues from a snapshot under its own name; afterwards it is as before."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"before".ljust(1 << 20, b"\0"))
    block = vm_block("one", f'disk "{disk}" format raw', enabled=True)
    other = vm_block("other", memory="32M")
    with start_vmd(block + other) as vmd, vmd.client() as client:
        started(vmd, "one")
        assert vmctl(vmd, "snapshot", "one", "first")[0] == 0
        wanted = "vmctl: start vm command failed: Operation already in progress\n"
        assert vmctl(vmd, "start", "one", "--from", "first") == (1, wanted)
        assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
        disk.write_bytes(b"later".ljust(1 << 20, b"\0"))
        assert vmctl(vmd, "start", "one", "--from", "first")[0] == 0
        running(vmd, "one")
        assert client.vm("one")["id"] == 1
        status, text = vmctl(vmd, "start", "other", "--from", "first")
        wanted = "vmctl: the snapshot is of a VM with other memory than other"
        assert (status, text.splitlines()[-1]) == (1, wanted)
        assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
        assert vmctl(vmd, "start", "one")[0] == 0
        started(vmd, "one")
        assert vmctl(vmd, "snapshot", "-r", "first")[0] == 0
        assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
        assert disk.read_bytes()[:5] == b"later"


def test_a_paused_vm_stays_paused(start_vmd: Start) -> None:
    """After a snapshot of a paused VM the source is still paused; the copy runs."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        started(vmd, "one")
        assert client.ask("pause", name="one")["type"] == "done"
        assert vmctl(vmd, "snapshot", "one", "first")[0] == 0
        assert client.vm("one")["state"] == "paused"
        assert vmctl(vmd, "start", "two", "--from", "first")[0] == 0
        running(vmd, "two")


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_disks_that_are_left_out(start_vmd: Start, tmp_path: Path, kind: str) -> None:
    """A copy of a snapshot without disks needs the disk's lock, and its contents."""
    disk = tmp_path / f"disk.{kind}"
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, disk, "8M"], check=True)
    block = vm_block("one", f'disk "{disk}" format {kind}', enabled=True)
    with start_vmd(block) as vmd, vmd.client() as client:
        started(vmd, "one")
        assert vmctl(vmd, "snapshot", "--no-disks", "one", "first")[0] == 0
        running(vmd, "one")
        status, text = vmctl(vmd, "start", "two", "--from", "first")
        assert (status, text.splitlines()[0]) == (1, "vmctl: could not open disk image(s)")
        assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
        assert vmctl(vmd, "start", "two", "--from", "first")[0] == 0
        running(vmd, "two")
        assert client.ask("stop", name="two", force=True, wait=True)["type"] == "terminated"
        with disk.open("r+b") as file:
            file.seek(-7, os.SEEK_END)
            file.write(b"changed")
        status, text = vmctl(vmd, "start", "two", "--from", "first")
        assert (status, text.splitlines()) == (
            1,
            [
                "vmctl: start vm command failed: No such file or directory",
                f"vmctl: disk {disk}: it has changed since the VM was written",
            ],
        )


@pytest.mark.parametrize(("kind", "pauses"), [("raw", True), ("qcow2", False)])
def test_disks_are_kept(start_vmd: Start, tmp_path: Path, kind: str, *, pauses: bool) -> None:
    """Copies have the disks of the snapshot, beside the VM and after it, and at a reboot."""
    disk, path = tmp_path / f"disk.{kind}", tmp_path / "file"
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, disk, "8M"], check=True)
    fill = ["qemu-io", "-f", kind, "-c"]
    subprocess.run([*fill, "write -P 0x51 1M 64k", disk], check=True, stdout=subprocess.DEVNULL)
    block = vm_block("one", f'disk "{disk}" format {kind}', enabled=True)
    with start_vmd(block) as vmd, vmd.client() as client:
        started(vmd, "one")
        assert vmctl(vmd, "snapshot", "one", "first")[0] == 0
        if pauses:
            assert client.ask("pause", name="one")["type"] == "done"
        assert vmctl(vmd, "snapshot", "-o", str(path), "one")[0] == 0
        if pauses:
            assert client.ask("unpause", name="one")["type"] == "done"
        running(vmd, "one")
        for name, origin in (("two", "first"), ("three", str(path))):
            assert vmctl(vmd, "start", name, "--from", origin)[0] == 0
            running(vmd, name)
        with SnapshotFile(os.open(path, os.O_RDONLY)) as file, path.open("rb") as contents:
            (kept,) = file.manifest.kept
            assert kept is not None
            assert kept[1] == 8 << 20
            contents.seek(kept[0] + (1 << 20) - 1)
            assert contents.read(3) == b"\0QQ"
            contents.seek(kept[0] + (1 << 20) + (64 << 10) - 1)
            assert contents.read(2) == b"Q\0"
        pid = client.vm("two")["pid"]
        with client.console("two") as console:
            console.type(b"r")
            console.read_to_end()
        client.wait_for_reboot("two", pid)
        assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
        subprocess.run([*fill, "write -P 0x52 1M 64k", disk], check=True, stdout=subprocess.DEVNULL)
        assert vmctl(vmd, "start", "four", "--from", "first")[0] == 0
        running(vmd, "four")
    run = [str(VMCTL), "run", "--from", str(path)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    text = f"vmctl: {path}: the VM's disks are in the snapshot: use 'vmctl start --from'\n"
    assert (done.returncode, done.stderr) == (1, text)


def test_a_snapshot_that_fails_leaves_nothing(start_vmd: Start) -> None:
    """If the target or the name is unusable, or the client killed, the VM runs on."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        started(vmd, "one")
        with Path("/dev/full").open("wb") as full:
            answer = client.ask("snapshot", (full.fileno(),), name="one", file=0)
        assert (answer["code"], answer["message"]) == ("EIO", "not a pipe, socket or file")
        running(vmd, "one")
        assert vmctl(vmd, "snapshot", "one", "../first")[1].splitlines()[1] == (
            "vmctl: invalid snapshot name"
        )
        assert vmctl(vmd, "snapshot", "one", "first")[0] == 0
        assert vmctl(vmd, "snapshot", "one", "first")[1].splitlines()[1] == (
            "vmctl: there is a snapshot first already"
        )
        running(vmd, "one")
        assert [path.name for path in stored(vmd)] == ["first.snapshot"]
        commands = [
            subprocess.Popen(
                [VMCTL, "snapshot", "one", f"killed{number}"],
                env={**os.environ, "VMD_SOCKET": str(vmd.socket)},
                stderr=subprocess.DEVNULL,
            )
            for number in range(3)
        ]
        for command in commands:
            command.kill()
            command.wait()
        client.wait_for_state("one", "running")
        running(vmd, "one")
        assert all(re.fullmatch(r"(first|killed\d)\.snapshot", one.name) for one in stored(vmd))


def edited(whole: bytes, old: bytes, new: bytes) -> bytes:
    """Return a snapshot with another manifest of the same length, whose checksum is right."""
    magic, text_size, flags, state_size, *rest, _ = _HEAD.unpack_from(whole)
    size = text_size + state_size
    body = whole[_HEAD.size : _HEAD.size + size].replace(old, new, 1)
    assert len(body) == size
    digest = hashlib.sha256(body).digest()
    head = _HEAD.pack(magic, text_size, flags, state_size, *rest, digest)
    return head + body + whole[len(head) + len(body) :]


def test_a_full_disk_is_no_end_of_a_vm(start_vmd: Start, tmp_path: Path) -> None:
    """A snapshot without room is removed, in the store and elsewhere, and the VM runs on."""
    with small_file_system(tmp_path / "small") as small:
        room = os.statvfs(small.place)
        with (small.place / "more").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - (64 << 10))
        before = sorted(small.place.iterdir())
        config = f'snapshots "{small.place}/store"\n' + vm_block("one", enabled=True)
        with start_vmd(config) as vmd:
            pid = started(vmd, "one")
            for words in (("one", "first"), ("-o", str(small.place / "file"), "one")):
                status, text = vmctl(vmd, "snapshot", *words)
                assert (status, text.splitlines()[0]) == (
                    1,
                    "vmctl: snapshot command failed: No space left on device",
                )
                running(vmd, "one")
            assert sorted(path for path in small.place.rglob("*") if path.is_file()) == before
            assert is_alive(pid)
            assert vmctl(vmd, "snapshot", "-o", str(tmp_path / "file"), "one")[0] == 0


def test_an_edited_snapshot_is_refused(start_vmd: Start, tmp_path: Path) -> None:
    """A damaged, cut or foreign snapshot is refused in a line or two, and leaves no VM."""
    path = tmp_path / "file"
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        pid = started(vmd, "one")
        assert vmctl(vmd, "snapshot", "-o", str(path), "one")[0] == 0
        whole = path.read_bytes()
        cpuid = re.search(rb'"cpuid":\[\[0,0,(\d+),(\d+)', whole)
        assert cpuid
        is_there, file = "start vm command failed: No such file or directory", f"{path}: "
        for data, wanted in (
            (b"", file + "incompatible dump signature"),
            (whole[:20], file + "header: the file ends too early"),
            (whole[: len(whole) // 2], file + "header: the file ends too early"),
            (
                whole.replace(b'"name"', b'"nome"', 1),
                file + "the checksum is wrong: the file is damaged",
            ),
            (
                edited(whole, b'"format":[1,', b'"format":[9,'),
                file + "incompatible dump version: 9.0, this program reads 1.x",
            ),
            (
                edited(whole, cpuid.group(0), cpuid.group(0)[:-1] + b"0"),
                f"{is_there}\nvmctl: incompatible cpu brand",
            ),
            (
                edited(whole, cpuid.group(0), b'"cpuid":[[0,0,99,' + cpuid.group(2)),
                f"{is_there}\nvmctl: incompatible cpuid level",
            ),
            (edited(whole, b'"cpus":1', b'"cpus":2'), f"{is_there}\nvmctl: 'vcpu1': missing"),
        ):
            path.write_bytes(data)
            status, said = vmctl(vmd, "start", "two", "--from", str(path))
            assert (status, said) == (1, f"vmctl: {wanted}\n")
            assert client.ask("status", name="two")["vms"] == []
        assert is_alive(pid)
        running(vmd, "one")


def test_a_guest_loses_no_tick(start_vmd: Start, tmp_path: Path) -> None:
    """A counting guest counts on, here and in its copies, from one snapshot to the next."""
    image = tmp_path / "counting.bin"
    image.write_bytes(counting_guest())
    with start_vmd(vm_block("one", enabled=True, boot=image, memory="4M")) as vmd:
        with vmd.client() as client:
            client.wait_for_state("one", "running")
        counted = [0]
        for number in range(4):
            source = "one" if number < 2 else f"copy{number - 1}"
            path = tmp_path / f"snapshot{number}"
            for _ in range(100):
                assert vmctl(vmd, "snapshot", "-o", str(path), source)[0] == 0
                with path.open("rb") as file:
                    start = _HEAD.unpack(file.read(_HEAD.size))[4]
                    file.seek(start + _AT)
                    rounds, _, ticks, _ = struct.unpack("<IIII", file.read(16))
                if rounds > counted[-1] + 8 and ticks:
                    break
                path.unlink()
                threading.Event().wait(0.2)
            assert rounds > counted[-1] + 8
            counted.append(rounds)
            status, said = vmctl(vmd, "start", f"copy{number}", "--from", str(path))
            assert status == 0, said
        with vmd.client() as client:
            assert {vm["state"] for vm in client.vms()} == {"running"}


def test_killed_parties(capsys: pytest.CaptureFixture[str]) -> None:
    """After any kill snapshots are whole or do not exist, and no file is left."""
    assert kill_snapshot.main(["--count", "6", "--seed", "3"]) == 0, capsys.readouterr().out
