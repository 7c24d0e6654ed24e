"""`vmctl send` and `vmctl receive`: their requests, and every text and exit status.

Source: section 3.10 of OpenBSD's behaviour; OpenBSD vmctl/vmctl.c, send_vm, vm_start_complete.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.unit.snapshot.samples import MANIFEST, stream
from tests.unit.vmctl.conftest import Serve
from tests.vmctl_driver import VMCTL
from vmd.wire.messages import AnyRequest, Done, ErrorCode, Failed, Started
from vmd.wire.transfers import Receive as ReceiveRequest
from vmd.wire.transfers import ReceivedInterface
from vmd.wire.transfers import Send as SendRequest
from vmm_kvm.boot_device import BootDevice
from vmm_kvm.snapshot.manifest import Disk, Interface, encode

PLAIN = MANIFEST._replace(disks=(), cdrom=None)


def run(
    *words: str, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.PIPE
) -> tuple[int, str]:
    """Run vmctl; return its exit status and its standard error."""
    done = subprocess.run(
        [VMCTL, *words],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def receive(data: bytes, *words: str) -> tuple[int, str]:
    """Run `vmctl receive` with a stream on its standard input."""
    read_fd, write_fd = os.pipe()
    with os.fdopen(write_fd, "wb") as writer, os.fdopen(read_fd, "rb") as reader:
        writer.write(data)
        writer.close()
        return run("receive", *words, stdin=reader.fileno())


def refuse(code: ErrorCode, message: str = "") -> Failed:
    """Return a refusal."""
    return Failed(code=code, message=message)


@pytest.mark.parametrize(
    ("words", "request_", "text"),
    [
        (("web",), SendRequest(name="web", stream=0), "sent vm web successfully"),
        (("7",), SendRequest(id=7, stream=0), "sent vm 7 successfully"),
        (
            ("-l", "web"),
            SendRequest(name="web", stream=0, keeps_running=True),
            "sent vm web successfully",
        ),
    ],
)
def test_send(words: tuple[str, ...], request_: SendRequest, text: str, serve: Serve) -> None:
    """A VM is sent by its id or name, and reported by that, as in OpenBSD."""
    daemon = serve(lambda _: [Done(id=7)])
    assert run("send", *words) == (0, f"vmctl: {text}\n")
    assert (daemon.requests, daemon.fd_counts) == ([request_], [1])


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (refuse(ErrorCode.ENOENT, "no such VM"), "No such file or directory\nvmctl: no such VM"),
        (refuse(ErrorCode.EPERM, "only for root"), "Operation not permitted\nvmctl: only for root"),
        (
            refuse(ErrorCode.NOT_RUNNING, "the VM is not running"),
            "vm is not running\nvmctl: the VM is not running",
        ),
        (
            refuse(ErrorCode.EALREADY, "the VM is being sent"),
            "Operation already in progress\nvmctl: the VM is being sent",
        ),
        (
            refuse(ErrorCode.EIO, "Broken pipe"),
            "Input/output error\nvmctl: Broken pipe",
        ),
        (
            refuse(ErrorCode.ENOSPC, "No space left on device"),
            "No space left on device\nvmctl: No space left on device",
        ),
        (refuse(ErrorCode.EINTR, "the VM stops"), "Interrupted system call\nvmctl: the VM stops"),
    ],
)
def test_send_fails(answer: Failed, text: str, serve: Serve) -> None:
    """A failed send is an error; OpenBSD's vmctl would not notice."""
    serve(lambda _: [answer])
    assert run("send", "web") == (1, f"vmctl: send vm command failed: {text}\n")


def test_send_into_a_terminal_is_refused() -> None:
    """A guest's memory is not written to a terminal."""
    ours, theirs = os.openpty()
    try:
        assert run("send", "web", stdout=theirs) == (
            1,
            "vmctl: standard output is a terminal: send into a file or a pipe\n",
        )
        assert run("receive", "web", stdin=theirs) == (
            1,
            "vmctl: standard input is a terminal: receive from a file or a pipe\n",
        )
    finally:
        os.close(ours)
        os.close(theirs)


def test_receive(serve: Serve, tmp_path: Path) -> None:
    """Files that the stream names are opened here, and the daemon does the rest."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    manifest = MANIFEST._replace(
        disks=(Disk(str(disk), "raw", "serial", 2),),
        cdrom=str(disk),
        interfaces=(
            Interface("fe:e1:bb:d1:00:01", 9000, 2, switch="uplink", group="g", rdomain=3),
        ),
    )
    daemon = serve(lambda _: [Started(id=3, pid=99, tty="/dev/pts/3")])
    assert receive(stream(manifest), "-p", "new") == (
        0,
        "vmctl: started vm 3 successfully, tty /dev/pts/3\n",
    )
    (request,) = daemon.requests
    assert isinstance(request, ReceiveRequest)
    (sent,) = request.disks
    assert (sent.path, sent.chain, sent.format, sent.serial, sent.queues) == (
        str(disk),
        (1,),
        "raw",
        "serial",
        2,
    )
    assert request == ReceiveRequest(
        name="new",
        stream=0,
        manifest=encode(manifest).decode(),
        stays_paused=True,
        uid=1000,
        memory=3 << 20,
        cpus=1,
        disks=(sent,),
        interfaces=(
            ReceivedInterface(
                lladdr="fe:e1:bb:d1:00:01",
                switch="uplink",
                group="g",
                rdomain=3,
                mtu=9000,
                queues=2,
            ),
        ),
        cdrom=str(disk),
        cdrom_image=2,
        firmware="bios",
        boot_device=BootDevice.DISK,
    )
    assert daemon.fd_counts == [3]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (refuse(ErrorCode.BIOS_MISSING), "vmm bios firmware file not found."),
        (
            refuse(ErrorCode.DISK_MISSING, "disk.img: in use by another process"),
            "could not open disk image(s)\nvmctl: disk.img: in use by another process",
        ),
        (refuse(ErrorCode.CDROM_MISSING), "could not find specified iso image"),
        (refuse(ErrorCode.CDROM_INVALID), "specified iso image is not a regular file"),
        (
            refuse(ErrorCode.ENOENT, "incompatible cpuid level"),
            "start vm command failed: No such file or directory\nvmctl: incompatible cpuid level",
        ),
        (
            refuse(ErrorCode.EIO, "memory: the stream ends too early"),
            "start vm command failed: Input/output error\nvmctl: memory: the stream ends too early",
        ),
        (
            refuse(ErrorCode.EPERM, "only for root"),
            "start vm command failed: Operation not permitted\nvmctl: only for root",
        ),
        (
            refuse(ErrorCode.EALREADY, 'there is a VM "new"'),
            'start vm command failed: Operation already in progress\nvmctl: there is a VM "new"',
        ),
    ],
)
def test_receive_fails(answer: Failed, text: str, serve: Serve) -> None:
    """A failed receive has the texts of a failed start, as in OpenBSD."""
    serve(lambda _: [answer])
    assert receive(stream(PLAIN), "new") == (1, f"vmctl: {text}\n")


@pytest.mark.parametrize(
    ("words", "data", "text"),
    [
        (("7",), b"", "invalid id: 7"),
        (("a/b",), b"", "invalid VM name"),
        (("n",), b"", "standard input: header: the stream ends too early"),
        (("n",), stream(PLAIN)[:200], "standard input: manifest: the stream ends too early"),
        (("n",), b"OpenBSDVMM58" * 9, "standard input: incompatible dump signature"),
        (
            ("n",),
            stream(PLAIN).replace(b'"format":[1,0]', b'"format":[2,0]'),
            "standard input: incompatible dump version: 2.0, this program reads 1.x",
        ),
        (
            ("n",),
            stream(PLAIN._replace(disks=(Disk("/none/disk.img", "raw"),))),
            "cannot open disk '/none/disk.img': No such file or directory",
        ),
        (
            ("n",),
            stream(PLAIN._replace(disks=(Disk("/none/disk.img", "vmdk"),))),
            "invalid disk: /none/disk.img: unknown kind vmdk",
        ),
        (
            ("n",),
            stream(PLAIN._replace(cdrom="/none/cd.iso")),
            "cannot open iso image '/none/cd.iso': No such file or directory",
        ),
    ],
)
def test_what_receive_refuses_itself(
    words: tuple[str, ...], data: bytes, text: str, serve: Serve
) -> None:
    """A stream that is no VM, or none for this host, is refused before the daemon is asked."""

    def refuse_all(request: AnyRequest) -> list[Failed]:
        raise AssertionError(request)

    serve(refuse_all)
    assert receive(data, *words) == (1, f"vmctl: {text}\n")
