"""`vmctl run -- command`: a command in a VM whose root is this host's, as if it ran here.

One process runs the VM, another has the streams: this one. The root is shared read-only, under a
layer in memory; with --rw it is the host's own. The guest's agent executes the command, in the
same directory; its exit status is ours.
"""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn, Protocol

from vmctl.client import CommandError
from vmctl.foreground.faults import told
from vmctl.foreground.root_guest import ROOT_TAG, find_kernel, initramfs
from vmctl.guest.access import agent_of
from vmctl.guest.agent import AgentError
from vmctl.guest.execute import EXIT_NO_CONNECTION, execute_by
from vmctl.messages import fail
from vmctl.report import EXIT_TIMEOUT
from vmctl.signals import cleaning_up
from vmctl.values import once
from vmd.confine.sandbox import die_with
from vmm_kvm.absolute import working_directory
from vmm_kvm.errors import SpecError
from vmm_kvm.text import printable

BOOT_S = 300.0
"""How long a guest may take until its agent answers."""
EXIT_ERROR = 1
_COMMAND_LINE = "console=ttyS0 quiet loglevel=3 panic=-1"
_MEMORY = "1G"
_LOOK_S = 0.02
_LINES_SHOWN = 10
_LINE_MAX = 512
_PASSED_ON = ("HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TERM", "TZ", "USER")
"""Variables that the command has from here."""
# What a command's VM has its own of, or cannot have.
_REFUSED = {
    "selftest": "--selftest",
    "firmware": "--firmware",
    "nvram": "--nvram",
    "boot_device": "-B",
    "cdrom": "-r",
    "initrd": "--initrd",
    "origin": "--from",
    "until": "--wait",
    "vsock": "--vsock",
    "as_json": "--json",
    "gdb": "--gdb",
    "cloud_init": "--cloud-init",
    "ssh_keys": "--ssh-key",
    "agent": "--agent",
    "virtio_console": "--virtio-console",
    "console": "-c",
}

Value = bool | int | str | tuple[str, ...]


class Run(Protocol):
    """What runs a VM in the foreground; returns the exit status."""

    def __call__(self, words: Sequence[str] = (), **given: Value) -> int:
        """Run it; `given` are fields of RunOptions."""


def run_command(
    name: str,
    command: tuple[str, ...],
    given: Mapping[str, Value],
    run: Run,
) -> int:
    """Run a command in a VM; returns its exit status. Errors are one line on stderr.

    Args:
        name: the VM's name, or "".
        command: the command and its arguments.
        given: options of the VM, fields of RunOptions.
        run: what runs the VM, in a process of its own.
    """
    try:
        _check(given)
        with cleaning_up(), ExitStack() as stack:
            vm = _Vm(name, given, run, stack)
            return vm.execute(command)
    except (CommandError, SpecError, OSError) as err:
        fail(told(err))
        return EXIT_ERROR


def agent_path() -> Path:
    """Return the agent's file, which the guest finds in the same place."""
    import vmm_agent  # noqa: PLC0415 - only its place is wanted

    return Path(vmm_agent.__file__).absolute().with_name("agent.py")


def _check(given: Mapping[str, Value]) -> None:
    for field, option in _REFUSED.items():
        if given.get(field):
            raise SpecError(f"{option} is not for a command: its VM boots this host's root")


class _Vm:
    """The process that runs the VM; ends with `stack`."""

    def __init__(
        self,
        name: str,
        given: Mapping[str, Value],
        run: Run,
        stack: ExitStack,
    ) -> None:
        """Start it; `given` are the fields of RunOptions that the user has given."""
        self._directory = working_directory()
        is_writable = bool(given.get("is_writable"))
        boot = given.get("boot", ())
        kernel = find_kernel(once(boot, "boot image") if isinstance(boot, tuple) else None)
        folder = tempfile.mkdtemp(prefix="vmctl-run-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        image = Path(folder) / "initramfs"
        image.write_bytes(initramfs(kernel, agent_path(), is_writable=is_writable))
        self._socket = str(Path(folder) / "vsock")
        append = once(_texts(given, "append"), "append")
        options: dict[str, Value] = {
            **given,
            "boot": (str(kernel.path),),
            "initrd": (str(image),),
            "append": (f"{_COMMAND_LINE} {append or ''}".rstrip(),),
            "memory": _texts(given, "memory") or (_MEMORY,),
            "shares": (
                f"/:{ROOT_TAG}{'' if is_writable else ':ro'}",
                *_texts(given, "shares"),
            ),
            "vsock": (self._socket,),
            "no_reboot": True,
            "is_writable": False,
        }
        self._console: deque[bytes] = deque(maxlen=_LINES_SHOWN)
        console, shown = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _live(name, options, run, shown)
        os.close(shown)
        self._reader = threading.Thread(target=self._read, args=(console,), daemon=True)
        self._reader.start()
        self._pidfd = os.pidfd_open(self._pid)
        stack.callback(self._end)

    def execute(self, command: tuple[str, ...]) -> int:
        """Wait for the agent, and execute a command by it."""
        status = self._await_agent()
        if status is not None:
            return status
        has_terminal = os.isatty(0) and os.isatty(1)
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        status = execute_by(
            agent_of(self._socket),
            command,
            interactive=True,
            terminal=has_terminal,
            directory=self._directory,
            environment=environment,
        )
        if status == EXIT_NO_CONNECTION and self._has_ended(BOOT_S / 100) == EXIT_TIMEOUT:
            return EXIT_TIMEOUT  # it has said so
        return status

    def _await_agent(self) -> int | None:
        """Return None when the agent answers, or the exit status of a VM without one."""
        until = time.monotonic() + BOOT_S
        agent = agent_of(self._socket, until)
        while True:
            status = self._has_ended(_LOOK_S)
            if status is not None:
                if status != EXIT_TIMEOUT:
                    self._show_console()
                    fail("the VM has ended before the command began")
                return status or EXIT_ERROR
            if time.monotonic() >= until:
                self._show_console()
                fail("the guest's agent does not answer")
                return EXIT_ERROR
            try:
                agent.ping(timeout=BOOT_S)
            except (AgentError, TimeoutError):
                continue
            return None

    def _has_ended(self, seconds: float) -> int | None:
        """Wait for the VM's process; returns its exit status, None while it runs."""
        import select  # noqa: PLC0415 - for this alone

        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return None
        found = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT)
        return found.si_status if found and found.si_code == os.CLD_EXITED else EXIT_ERROR

    def _read(self, console: int) -> None:
        """Keep the last lines of the console; a thread."""
        rest = b""
        with open(console, "rb", buffering=0) as pipe:
            while piece := pipe.read(1 << 16):
                *lines, rest = (rest + piece).split(b"\n")
                self._console.extend(line[:_LINE_MAX] for line in lines)
                rest = rest[-_LINE_MAX:]
        if rest:
            self._console.append(rest)

    def _show_console(self) -> None:
        """Show what the guest said last."""
        self._kill()
        self._reader.join()
        for line in self._console:
            print(printable(line.decode(errors="replace").rstrip()), file=sys.stderr)

    def _kill(self) -> None:
        """Kill the VM: nothing of it is to stay; what was written is the host's already."""
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return

    def _end(self) -> None:
        self._kill()
        os.waitpid(self._pid, 0)
        self._reader.join()
        os.close(self._pidfd)


def _texts(given: Mapping[str, Value], field: str) -> tuple[str, ...]:
    value = given.get(field, ())
    return value if isinstance(value, tuple) else ()


def _live(name: str, options: dict[str, Value], run: Run, shown: int) -> NoReturn:
    """Run the VM in this process, its console on `shown`."""
    status = EXIT_ERROR
    try:
        die_with(os.getppid())
        os.setpgid(0, 0)  # signals of the terminal are the command's
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(shown, 1)
        os.close(null)
        os.close(shown)
        status = run((name,), **options)
    except BaseException:  # noqa: BLE001 - nothing may go up from here
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)
