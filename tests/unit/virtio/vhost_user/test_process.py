"""Device processes: they serve, end with their connection, and crash alone."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest

from tests.unit.virtio.vhost_user.rig import EchoBackend, driver
from vmm_kvm.errors import ImageError, VmmError
from vmm_kvm.virtio.vhost_user.client import Client
from vmm_kvm.virtio.vhost_user.messages import VhostUserError
from vmm_kvm.virtio.vhost_user.process import DeviceProcess, spawn_device_process


class FileBackend(EchoBackend):
    """A backend that leaves a file behind at an orderly close."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def close(self) -> None:
        """Write the file."""
        self._path.write_text("closed")


def _pid(process: DeviceProcess) -> int:
    assert process._pid is not None
    return process._pid


def test_it_serves_and_ends_with_its_connection(tmp_path: Path) -> None:
    """Another process answers a request; when we close, it closes its backend and ends."""
    path = tmp_path / "closed"
    with spawn_device_process(lambda: FileBackend(path), "disk0") as process:
        assert _pid(process) != os.getpid()
        with driver() as guest, Client(process.connection) as client:
            guest.start(client)
            assert guest.request(b"hello") == b"HELLO"
            assert not path.exists()
    assert path.read_text() == "closed"
    process.close()


def test_it_has_only_its_own_descriptors(tmp_path: Path) -> None:
    """The process has the standard descriptors, its connection, and those that it is to keep."""
    file = (tmp_path / "file").open("w")
    kept = (tmp_path / "kept").open("w")
    with (
        file,
        kept,
        spawn_device_process(EchoBackend, "disk0", [kept.fileno()]) as process,
        Client(process.connection) as client,
    ):
        assert client.queue_count() == 2  # the loop runs
        listed = {
            int(entry.name): str(entry.readlink()).split(":")[0]
            for entry in Path(f"/proc/{_pid(process)}/fd").iterdir()
        }
        opened = sorted(target for fd, target in listed.items() if fd > 2)
        assert opened == [str(tmp_path / "kept"), "anon_inode", "anon_inode", "socket"]


def test_what_it_cannot_open_is_told() -> None:
    """An error of the backend is raised here, with its text."""

    def fail() -> EchoBackend:
        raise ImageError("disk0.img: is not there")

    with pytest.raises(VmmError, match=r"^disk0\.img: is not there$"):
        spawn_device_process(fail, "disk0")


def test_a_crash_at_its_start_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    """A process that ends before it is ready is an error of the start."""

    def crash() -> EchoBackend:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with pytest.raises(VmmError, match="disk0: its device process has crashed"):
        spawn_device_process(crash, "disk0")
    assert capfd.readouterr().out == ""


def test_a_crash_is_noticed_by_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    """The user of the connection gets an error, and one line tells of the crash."""
    with (
        spawn_device_process(EchoBackend, "disk0") as process,
        Client(process.connection) as client,
    ):
        pid = _pid(process)
        os.kill(pid, signal.SIGKILL)
        gone = select.poll()
        gone.register(client.fileno(), select.POLLRDHUP)
        assert gone.poll(10_000)
        with pytest.raises(VhostUserError):
            client.queue_count()
    assert caplog.messages == [f"disk0: device process {pid} was killed by signal 9"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_for_the_group_do_not_reach_it(number: signal.Signals) -> None:
    """Signals for the whole group do not end it before its VM does."""
    with spawn_device_process(EchoBackend, "disk0") as process:
        os.kill(_pid(process), number)
        with driver() as guest, Client(process.connection) as client:
            guest.start(client)
            assert guest.request(b"still") == b"STILL"


def test_our_signal_mask_is_as_before() -> None:
    """Signals are blocked only around the fork."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with spawn_device_process(EchoBackend, "disk0"):
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
