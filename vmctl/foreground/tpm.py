"""The TPM of `vmctl run --tpm`: a swtpm process for each VM."""

import os
import shutil
import socket
import subprocess
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from vmd.confine.sandbox import die_with
from vmm_kvm.errors import SpecError
from vmm_kvm.swtpm import Swtpm, arguments

_END_S = 10.0
_MODE = 0o700


def start_swtpm(directory: str, stack: ExitStack) -> Swtpm:
    """Start a TPM whose secrets lie in `directory`, made if it is missing; `stack` ends it.

    It ends with this process too, however that ends.

    Raises:
        SpecError: there is no swtpm, or no such directory can be.
        OSError: the host has no descriptors or processes left.
    """
    program = shutil.which("swtpm")
    if program is None:
        raise SpecError("--tpm: swtpm is not installed")
    path = Path(directory)
    if "," in directory:  # swtpm has no way to say that it is part of a name
        raise SpecError(f"--tpm: {directory}: swtpm takes no comma in a path")
    try:
        path.mkdir(_MODE, exist_ok=True)
    except OSError as err:
        raise SpecError(f"--tpm: {directory}: {err.strerror}") from err
    (control, its_control), (data, its_data) = socket.socketpair(), socket.socketpair()
    with its_control, its_data:
        process = subprocess.Popen(
            [program, *arguments(its_control.fileno(), its_data.fileno(), directory)],
            pass_fds=(its_control.fileno(), its_data.fileno()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # ^C is for the VM
            # One that executes a command when its VM is killed does not end: swtpm 0.7.
            preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509 - there is one thread yet
        )
    stack.callback(_end, process)
    return stack.enter_context(Swtpm(control, data))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait until swtpm has written its state and ended; it has been disconnected."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
        return
    process.kill()
    process.wait()
