"""The parent kills processes of VMs for vmm, and no others, whatever vmm requests."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from vmd.confine.uids import UidRange, Uids
from vmd.parent.hung import end_hung

_UIDS = Uids(UidRange(0x7E00_0000, 0x1000), -1)
_VM = _UIDS.vms[5]
_TIMEOUT_S = 20

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="other users' processes need root")


@pytest.fixture
def uid() -> int | None:
    """Return the user of `process`; None for ours."""
    return None


@pytest.fixture
def process(uid: int | None) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start a process that waits, with a pidfd of it."""
    with subprocess.Popen(["sleep", "60"], user=uid) as running:
        pidfd = os.pidfd_open(running.pid)
        yield running, pidfd
        os.close(pidfd)
        running.kill()


Process = tuple[subprocess.Popen[bytes], int]


@needs_root
@pytest.mark.parametrize("uid", [_VM])
def test_a_process_of_a_vm(process: Process) -> None:
    """The process is killed; if it has ended already, that is no error."""
    running, pidfd = process
    for _ in range(2):
        child = end_hung(pidfd, _VM, _UIDS, ())
        assert os.waitpid(child, 0)[1] == 0
        assert running.wait(_TIMEOUT_S) == -signal.SIGKILL


@needs_root
@pytest.mark.parametrize("uid", [0, 65534, _UIDS.control, _UIDS.zygote, _UIDS.vms[6]])
@pytest.mark.parametrize("said", [_VM, 0, 65534, _UIDS.zygote])
def test_processes_of_others(process: Process, uid: int, said: int) -> None:
    """Processes of root, a user, control, and another VM are not killed, whatever vmm claims."""
    assert said != uid or said not in _UIDS.vms
    running, pidfd = process
    child = end_hung(pidfd, said, _UIDS, (os.getpid(),))
    assert (child != 0) == (said == _VM)
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(0.05)


def test_where_all_have_one_user(process: Process, caplog: pytest.LogCaptureFixture) -> None:
    """Only children of vmm are killed; a descriptor that is no pidfd is refused."""
    running, pidfd = process
    end_hung(pidfd, 0, None, (os.getppid(),))
    with open(os.devnull, "rb") as file:  # noqa: PTH123 - a descriptor
        end_hung(file.fileno(), 0, None, (os.getpid(),))
    assert len(caplog.messages) == 2
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(0.05)
    end_hung(pidfd, 0, None, (os.getpid(),))
    assert running.wait(_TIMEOUT_S) == -signal.SIGKILL
