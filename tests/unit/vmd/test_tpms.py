"""The parent's side of TPMs: whose secrets lie where, whose user a swtpm is, and refusals."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pytest

from vmd.config.model import Owner, VmConfig
from vmd.parent.errors import ResourceError
from vmd.parent.tpms import TPMS_PER_USER, Tpms
from vmd.rules.policy import Users
from vmd.rules.vm import Vm
from vmd.rules.vm_state import VmState
from vmd.wire.channel import Channel
from vmd.wire.internal import SetVerbosity
from vmd.wire.messages import ErrorCode
from vmd.wire.tpm import TPM_AND_PARENT, ParentToTpm, StartTpm, TpmEnded, TpmToParent
from vmm_kvm.loop import EventLoop

pytestmark = [
    pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away"),
]

BOB = 12345
FIRST = 0x7F00_0100


class Rig:
    """TPMs of a host, and the process that is to start them."""

    def __init__(self, path: Path) -> None:
        self.state = path / "state"
        self.loop = EventLoop()
        users = Users(frozenset({0}), lambda _uid, _gid: False)
        self.tpms = Tpms(self.loop, str(self.state), users, range(FIRST, FIRST + 2))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.tpms.peer.started(ours, lambda: None)
        self.process: Channel[TpmToParent, ParentToTpm] = Channel(theirs, TPM_AND_PARENT)
        assert isinstance(self.process.wait()[0], SetVerbosity)

    def start(self, name: str, owner: int = 0) -> StartTpm:
        """Start a VM's TPM; returns what the process is told, with a directory as it says."""
        vm = Vm(VmConfig(name, has_tpm=True, owner=Owner(owner)), VmState(1), owner)
        for fd in self.tpms.open(vm, None):
            os.close(fd)
        message, fds, _ = self.process.wait()
        assert isinstance(message, StartTpm)
        with fds:
            assert len(fds) == 3
            found = Path(f"/proc/self/fd/{fds.left[0]}").readlink()
            assert found == self.state / "tpm" / message.state
            assert (found.stat().st_uid, found.stat().st_mode & 0o777) == (0, 0o777)
            assert (found.parent.stat().st_uid, found.parent.stat().st_mode & 0o777) == (0, 0o700)
        return message

    def end(self, started: StartTpm) -> None:
        """Have the process say that a swtpm has ended."""
        self.process.send(TpmEnded(number=started.number))
        self.loop.call_soon(self.loop.stop)
        self.loop.run()

    def error(self, name: str, owner: int = 0) -> tuple[ErrorCode, str]:
        """Return why a VM's TPM cannot start."""
        with pytest.raises(ResourceError) as caught:
            self.start(name, owner)
        return caught.value.code, str(caught.value)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Return a host."""
    made = Rig(tmp_path)
    yield made
    made.tpms.peer.close()
    made.process.close()
    made.loop.close()


def test_who_has_which(rig: Rig) -> None:
    """Each name of each owner has secrets of its own, and no two swtpm of a time have one user."""
    first = rig.start("one")
    assert (first.state, first.uid) == ("one-0", FIRST)
    second = rig.start("one", BOB)
    assert (second.state, second.uid) == (f"one-{BOB}", FIRST + 1)
    assert rig.error("two") == (ErrorCode.EAGAIN, "tpm: all uids are in use (vmd --uids)")
    again = rig.start("one")  # the earlier one is about to end
    assert (again.state, again.uid) == ("one-0", FIRST)
    rig.end(first)
    assert rig.error("two")[0] is ErrorCode.EAGAIN
    rig.end(again)
    rig.end(again)  # it says so twice, which changes nothing
    assert rig.start("two").uid == FIRST
    rig.end(second)
    assert rig.start("one").uid == FIRST + 1


@pytest.mark.parametrize("kind", ["link", "hard link", "directory", "many"])
def test_what_a_swtpm_may_have_left(rig: Rig, tmp_path: Path, kind: str) -> None:
    """Only plain files of the directory are opened to the next one: nothing else's mode changes."""
    rig.end(rig.start("one"))
    directory = rig.state / "tpm" / "one-0"
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"")
    foreign.chmod(0o600)
    match kind:
        case "link":
            (directory / "x").symlink_to(foreign)
        case "hard link":
            (directory / "x").hardlink_to(foreign)
        case "directory":
            (directory / "x").mkdir()
        case _:
            for number in range(17):
                (directory / str(number)).write_bytes(b"")
    code, text = rig.error("one")
    assert (code, text) == (ErrorCode.EIO, f"tpm: {directory}: not only a TPM's files")
    assert foreign.stat().st_mode & 0o777 == 0o600


def test_a_user_has_so_many(rig: Rig) -> None:
    """TPMs outlive their VMs: each user has a limit of them, root none."""
    directory = rig.state / "tpm"
    directory.mkdir(parents=True)
    for number in range(TPMS_PER_USER):
        (directory / f"v{number}-{BOB}").mkdir(mode=0o700)
    assert rig.error("one", BOB) == (
        ErrorCode.EPERM,
        (
            f"tpm: limit of {TPMS_PER_USER} VMs of one user whose TPMs are kept: "
            f"root can remove some from {directory}"
        ),
    )
    rig.end(rig.start("v1", BOB))
    rig.end(rig.start("one"))
    rig.tpms.peer.close()
    assert rig.error("one")[0] is ErrorCode.EAGAIN


def test_secrets_that_root_has_removed(rig: Rig) -> None:
    """The next VM of the name and owner begins with an empty directory."""
    rig.end(rig.start("one"))
    directory = rig.state / "tpm" / "one-0"
    (directory / "tpm2-00.permall").touch(mode=0o666)
    rig.end(rig.start("one"))
    assert [each.name for each in directory.iterdir()] == ["tpm2-00.permall"]
    rmtree(directory)
    rig.start("one")
    assert list(directory.iterdir()) == []


def test_a_place_that_is_none(rig: Rig, tmp_path: Path) -> None:
    """A link in the place of the directory is not followed, and a file there is an error."""
    directory = rig.state / "tpm"
    directory.mkdir(parents=True)
    (directory / "one-0").symlink_to(tmp_path)
    (directory / "two-0").write_bytes(b"")
    assert rig.error("one")[1] == f"tpm: {directory}/one-0: Not a directory"
    assert rig.error("two")[1] == f"tpm: {directory}/two-0: Not a directory"
