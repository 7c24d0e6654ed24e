"""Our front-end with a server that is not ours: qemu-storage-daemon."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.virtio.vhost_user.rig import EVENT_IDX, VERSION_1, Driver, connect, driver
from tests.unit.virtio.vhost_user.test_frontend import RecordingTransport
from vmm_kvm.virtio.vhost_user.frontend import QUEUE_SIZE, VhostUser

MIB = 1 << 20
TIMEOUT_S = 20
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR = b"\0", b"\1"
MQ = 1 << 12

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-storage-daemon") is None, reason="needs the package qemu-utils"
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 1 MiB; its first sector says so."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"first sector".ljust(512, b".") + bytes(MIB - 512))
    return path


@contextmanager
def daemon(image: Path, *, writable: bool = True) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """Run qemu-storage-daemon with two queues; yield its socket and process."""
    path = image.parent / "daemon.sock"
    export = (
        f"type=vhost-user-blk,id=export,addr.type=unix,addr.path={path},node-name=disk,"
        f"writable={'on' if writable else 'off'},num-queues=2"
    )
    arguments = [
        *("qemu-storage-daemon", "--chardev", "stdio,id=monitor", "--monitor", "monitor"),
        *("--blockdev", f"driver=file,filename={image},node-name=file"),
        *("--blockdev", "driver=raw,file=file,node-name=disk", "--export", export),
    ]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # Commands are answered once everything is set up: the greeting, and two answers.
            process.stdin.write(b'{"execute": "qmp_capabilities"}{"execute": "query-version"}\n')
            process.stdin.flush()
            for _ in range(3):
                assert process.stdout.readline()
            yield path, process
        finally:
            process.kill()


@contextmanager
def device(
    path: Path, *, has_fds: bool = True
) -> Iterator[tuple[VhostUser, Driver, RecordingTransport]]:
    """Yield a dataplane that is connected to the daemon, its driver and its transport."""
    with driver() as guest:
        disk = VhostUser(connect(str(path)), guest, "disk0")
        transport = RecordingTransport(guest, has_fds=has_fds)
        disk.attach(transport)
        guest.notifiers = [disk.kick_fd(index) for index in range(2)]
        try:
            yield disk, guest, transport
        finally:
            disk.close()


def request(kind: int, sector: int = 0, data: bytes = b"") -> bytes:
    """Return a request as the driver writes it: a header, and data."""
    return kind.to_bytes(8, "little") + sector.to_bytes(8, "little") + data


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    """Return the data of a discard or of a write of zeroes."""
    return (
        sector.to_bytes(8, "little") + sectors.to_bytes(4, "little") + flags.to_bytes(4, "little")
    )


def test_what_it_offers(image: Path) -> None:
    """The device has the server's size, queues and features."""
    with daemon(image) as (path, _), device(path) as (disk, _, _):
        assert disk.queue_sizes == (QUEUE_SIZE,) * 2
        assert int.from_bytes(disk.config()[:8], "little") == MIB // 512
        wanted = MQ | EVENT_IDX | 1 << 9 | 1 << 13 | 1 << 14
        assert disk.features & wanted == wanted


@pytest.mark.parametrize("has_fds", [True, False])
@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX | 1 << 28 | MQ])
def test_requests(image: Path, features: int, has_fds: bool) -> None:
    """Every kind of request works, on both queues, with and without MSI-X."""
    data = bytes(range(256)) * 16
    with daemon(image) as (path, _), device(path, has_fds=has_fds) as (disk, guest, _):
        disk.start(features | 1 << 9 | 1 << 13 | 1 << 14, {0: guest.ring(0), 1: guest.ring(1)})
        first = b"first sector".ljust(512, b".")
        assert guest.request(request(IN), size=513) == first + OK
        assert guest.request(request(OUT, 8, data), 1, size=1) == OK
        assert guest.request(request(FLUSH), size=1) == OK
        assert guest.request(request(IN, 8), size=4097) == data + OK
        assert guest.request(request(DISCARD, 0, segment(8, 1)), size=1) == OK
        zeroes = request(WRITE_ZEROES, 0, segment(9, 1))
        assert guest.request(zeroes, 1, size=1) == OK
        assert guest.request(request(IN, 9), size=1025) == bytes(512) + data[1024:1536] + OK
        assert guest.request(request(IN, MIB // 512), size=513)[-1:] == IOERR
        for number in range(40):
            assert guest.request(request(OUT, number, data[:512]), number % 2, size=1) == OK
    assert image.read_bytes()[:512] == data[:512]


def test_a_reset_and_another_start(image: Path) -> None:
    """Rings stop and start again, one of them or both, as after a reboot."""
    with daemon(image) as (path, _), device(path) as (disk, guest, transport):
        for _ in range(3):
            guest.forget()
            disk.start(VERSION_1 | MQ, {0: guest.ring(0), 1: guest.ring(1)})
            assert guest.request(request(IN), size=513)[:5] == b"first"
            disk.stop_queue(0)
            assert guest.request(request(IN), 1, size=513)[:5] == b"first"
            disk.stop()
        assert transport.failures.empty()


def test_it_is_read_only(image: Path) -> None:
    """A read-only disk says so, and no write changes it."""
    before = image.read_bytes()
    with daemon(image, writable=False) as (path, _), device(path) as (disk, guest, _):
        assert disk.features >> 5 & 1
        disk.start(VERSION_1 | 1 << 5, {0: guest.ring(0)})
        assert guest.request(request(OUT, 0, bytes(512)), size=1) == IOERR
    assert image.read_bytes() == before


def test_it_is_killed(image: Path) -> None:
    """When the server is killed the device fails once, with one line; earlier writes stay."""
    with daemon(image) as (path, process), device(path) as (disk, guest, transport):
        disk.start(VERSION_1, {0: guest.ring(0)})
        assert guest.request(request(OUT, 1, b"x" * 512), size=1) == OK
        process.send_signal(signal.SIGKILL)
        reason = transport.failures.get(timeout=TIMEOUT_S)
        assert reason == "vhost-user: the server closed the connection"
        disk.stop()
        assert transport.failures.empty()
    assert image.read_bytes()[512:1024] == b"x" * 512


def test_a_broken_chain(image: Path) -> None:
    """A driver that breaks the rules loses at most its device, which can be closed and reset."""
    with daemon(image) as (path, process):
        with device(path) as (disk, guest, _):
            disk.start(VERSION_1, {0: guest.ring(0)})
            guest.offer(request(IN), gpa=1)
            guest.notify()
            disk.stop()
        with device(path) as (disk, guest, _):
            disk.start(VERSION_1, {0: guest.ring(0)})
            assert guest.request(request(IN), size=513)[:5] == b"first"
        assert process.poll() is None
