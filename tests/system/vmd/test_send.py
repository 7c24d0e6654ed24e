"""VMs that vmctl sends and receives, with real daemons, pipes and files."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.vmd.daemon import READY, Client, Daemon, is_alive, vm_block
from tests.vmctl_driver import VMCTL

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]
TIMEOUT_S = 120


def vmctl(
    vmd: Daemon, *words: str, stdin: int | None = None, stdout: int | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run vmctl, with these descriptors for its standard input and output."""
    return subprocess.run(
        [VMCTL, *words],
        env={**os.environ, "VMD_SOCKET": str(vmd.socket)},
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE,
        timeout=TIMEOUT_S,
        check=False,
    )


def send_to(path: Path, vmd: Daemon, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Send a VM into a file."""
    with path.open("wb") as file:
        return vmctl(vmd, "send", *words, stdout=file.fileno())


def receive_from(path: Path, vmd: Daemon, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Receive a VM from a file."""
    with path.open("rb") as file:
        return vmctl(vmd, "receive", *words, stdin=file.fileno())


def wait_until_sending(client: Client, name: str) -> None:
    """Wait until a running VM is being sent."""
    deadline = time.monotonic() + TIMEOUT_S
    while client.ask("unpause", name=name).get("code") != "EBUSY":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_vm_goes_through_a_file(start_vmd: Start, tmp_path: Path) -> None:
    """A sent VM has ended here, and runs on where it is received: it answers input."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        pid = client.wait_for_state("one", "running")["pid"]
        with client.console("one") as console:
            console.expect(READY)
        sent = send_to(tmp_path / "stream", vmd, "one")
        assert (sent.stderr, sent.returncode) == (b"vmctl: sent vm one successfully\n", 0)
        assert client.wait_for_state("one", "stopped")["pid"] is None
        assert isinstance(pid, int)
        assert not is_alive(pid)
        vmd.wait_for_log("one: sent vm 1 successfully.")
        received = receive_from(tmp_path / "stream", vmd, "two")
        assert received.stderr.startswith(b"vmctl: started vm 2 successfully, tty /dev/pts/")
        assert received.returncode == 0
        with client.console("two") as console:
            console.type(b"e")
            console.expect(b"e")


def running(vmd: Daemon, name: str) -> None:
    """Fail unless a VM runs, and its guest answers."""
    with vmd.client() as client, client.console(name) as console:
        console.type(b"e")
        console.expect(b"e", console.output.count(b"e") + 1)
        assert client.vm(name)["state"] == "running"


def started(vmd: Daemon, name: str) -> int:
    """Wait until a VM's guest is ready; return the pid of its process."""
    with vmd.client() as client:
        pid = client.wait_for_state(name, "running")["pid"]
        with client.console(name) as console:
            console.expect(READY)
    assert isinstance(pid, int)
    return pid


def test_a_vm_goes_through_a_pipe_on_one_host(start_vmd: Start, tmp_path: Path) -> None:
    """The receiver gets the disks as soon as the sender has ended, and not before."""
    disks = []
    for name in ("raw", "qcow2"):
        path = tmp_path / f"disk.{name}"
        subprocess.run(["qemu-img", "create", "-q", "-f", name, path, "8M"], check=True)
        disks.append(f'disk "{path}" format {name}')
    with start_vmd(vm_block("one", *disks, enabled=True)) as vmd, vmd.client() as client:
        pid = started(vmd, "one")
        read_fd, write_fd = os.pipe()
        receiver = subprocess.Popen(
            [VMCTL, "receive", "two"],
            env={**os.environ, "VMD_SOCKET": str(vmd.socket)},
            stdin=read_fd,
            stderr=subprocess.PIPE,
        )
        os.close(read_fd)
        sent = vmctl(vmd, "send", "one", stdout=write_fd)
        os.close(write_fd)
        errors = receiver.communicate(timeout=TIMEOUT_S)[1]
        assert (sent.stderr, sent.returncode) == (b"vmctl: sent vm one successfully\n", 0)
        assert receiver.returncode == 0, errors
        assert not is_alive(pid)
        running(vmd, "two")
        # The receiver has locked its disks; the sender has not.
        assert client.ask("start", name="one")["code"] == "disk-missing"
        assert client.ask("stop", name="two", force=True, wait=True)["type"] == "terminated"
        assert client.ask("start", name="one")["type"] == "started"


def test_a_copy_is_sent_while_the_vm_goes_on(start_vmd: Start, tmp_path: Path) -> None:
    """With -l both run; a paused VM stays paused here, and with -p there."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        pid = started(vmd, "one")
        sent = send_to(tmp_path / "stream", vmd, "-l", "one")
        assert (sent.stderr, sent.returncode) == (b"vmctl: sent vm one successfully\n", 0)
        running(vmd, "one")
        assert client.vm("one")["pid"] == pid
        assert receive_from(tmp_path / "stream", vmd, "-p", "two").returncode == 0
        assert client.vm("two")["state"] == "paused"
        assert client.ask("unpause", name="two")["type"] == "done"
        running(vmd, "two")
        assert client.ask("pause", name="one")["type"] == "done"
        assert send_to(tmp_path / "again", vmd, "-l", "one").returncode == 0
        assert client.vm("one")["state"] == "paused"


def test_a_vm_that_is_not_sent_goes_on(start_vmd: Start) -> None:
    """If the reader is gone, or the sender is interrupted, the VM runs on."""
    with start_vmd(vm_block("one", enabled=True)) as vmd:
        pid = started(vmd, "one")
        read_fd, write_fd = os.pipe()
        os.close(read_fd)
        sent = vmctl(vmd, "send", "one", stdout=write_fd)
        os.close(write_fd)
        text = b"vmctl: send vm command failed: Input/output error\nvmctl: Broken pipe\n"
        assert (sent.stderr, sent.returncode) == (text, 1)
        running(vmd, "one")

        read_fd, write_fd = os.pipe()  # without a reader
        sender = subprocess.Popen(
            [VMCTL, "send", "one"],
            env={**os.environ, "VMD_SOCKET": str(vmd.socket)},
            stdout=write_fd,
            stderr=subprocess.PIPE,
        )
        with vmd.client() as client:
            wait_until_sending(client, "one")
            assert client.ask("pause", name="one")["code"] == "EBUSY"
            sender.kill()
            sender.communicate()
            client.wait_for_state("one", "running")
            assert client.vm("one")["pid"] == pid
        os.close(read_fd)
        os.close(write_fd)
        running(vmd, "one")
        vmd.wait_for_log("one: cannot be sent: it was cancelled")


def test_a_vm_is_stopped_while_it_is_sent(start_vmd: Start) -> None:
    """A stop during a stalled send resumes the guest, which powers off."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        started(vmd, "one")
        read_fd, write_fd = os.pipe()
        sender = subprocess.Popen(
            [VMCTL, "send", "one"],
            env={**os.environ, "VMD_SOCKET": str(vmd.socket)},
            stdout=write_fd,
            stderr=subprocess.PIPE,
        )
        wait_until_sending(client, "one")
        assert client.ask("stop", name="one", wait=True)["type"] == "terminated"
        assert sender.communicate(timeout=TIMEOUT_S)[1].startswith(b"vmctl: send vm command failed")
        assert sender.returncode == 1
        os.close(read_fd)
        os.close(write_fd)


def edited(stream: bytes, old: bytes, new: bytes) -> bytes:
    """Return a stream with another manifest of the same length, whose checksum is right."""
    body = stream[:-32].replace(old, new, 1)
    return body + hashlib.sha256(body).digest()


def test_a_stream_that_is_no_vm_is_refused(start_vmd: Start, tmp_path: Path) -> None:
    """A stream that is cut short, damaged, or of another processor: one line, nothing is left."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        started(vmd, "one")
        path = tmp_path / "stream"
        assert send_to(path, vmd, "one").returncode == 0
        stream = path.read_bytes()
        cpuid = re.search(rb'"cpuid":\[\[0,0,(\d+),(\d+)', stream)
        assert cpuid
        flipped = bytearray(stream)
        flipped[-5000] ^= 1
        for data, text in (
            (stream[:-10], "checksum: the stream ends too early"),
            (stream[: len(stream) // 2], "the stream ends too early"),
            (bytes(flipped), "the checksum is wrong: the stream is damaged"),
            (
                edited(stream, cpuid.group(0), cpuid.group(0)[:-1] + b"0"),
                "incompatible cpu brand",
            ),
            (
                edited(stream, cpuid.group(0), b'"cpuid":[[0,0,99,' + cpuid.group(2)),
                "incompatible cpuid level",
            ),
            (edited(stream, b'"cpus":1', b'"cpus":2'), "missing"),
        ):
            path.write_bytes(data)
            refused = receive_from(path, vmd, "two")
            assert refused.returncode == 1
            lines = refused.stderr.decode().splitlines()
            assert lines[0] == "vmctl: start vm command failed: No such file or directory"
            assert len(lines) == 2
            assert text in lines[1], (text, lines)
            assert client.ask("status", name="two")["vms"] == []
        path.write_bytes(stream)
        assert receive_from(path, vmd, "two").returncode == 0
        assert receive_from(path, vmd, "two").stderr.startswith(
            b"vmctl: start vm command failed: Operation already in progress\n"
        )
        running(vmd, "two")


def test_a_vm_that_was_sent_runs_without_a_daemon(start_vmd: Start, tmp_path: Path) -> None:
    """`vmctl run --from` continues from the file with its disks, repeatedly; or says why not."""
    disk, path = tmp_path / "disk.raw", tmp_path / "stream"
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", disk, "8M"], check=True)
    with start_vmd(vm_block("one", f'disk "{disk}" format raw', enabled=True)) as vmd:
        started(vmd, "one")
        assert send_to(path, vmd, "one").returncode == 0
    for _ in range(2):
        run = [str(VMCTL), "run", "--from", str(path), "--timeout", "60"]
        done = subprocess.run(run, input=b"ep", capture_output=True, check=False)
        assert (done.stderr, done.returncode) == (b"", 0)
        assert done.stdout.startswith(b"e")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["/bin/sh", "-c", f"cat {path} > {fifo}"]) as writer:
        through = [str(fifo) if word == str(path) else word for word in run]
        done = subprocess.run(through, input=b"ep", capture_output=True, check=False)
        assert (done.stderr, done.returncode, writer.wait(10)) == (b"", 0, 0)
    done = subprocess.run([*run, "-m", "64M"], capture_output=True, check=False)
    assert (done.stderr, done.returncode) == (
        b"vmctl: --from says all of the VM: use no options that say what it is\n",
        1,
    )
    os.truncate(disk, 4 << 20)
    done = subprocess.run(run, capture_output=True, check=False)
    text = f"vmctl: {path}: disk {disk}: it has changed since the VM was written\n"
    assert (done.stderr, done.returncode) == (text.encode(), 1)
    path.write_bytes(path.read_bytes()[:5000])
    done = subprocess.run(run, capture_output=True, check=False)
    text = f"vmctl: {path}: memory: the stream ends too early\n"
    assert (done.stderr, done.returncode) == (text.encode(), 1)
