"""`autopkgtest-virt-vmm`: a virtualisation server of autopkgtest(1), whose testbeds are our VMs.

autopkgtest writes commands on our standard input, a line each, and reads answers. A testbed is a
clone of a template, or goes on from a snapshot: to revert is to drop it and to make another one.

Source: autopkgtest's README.virtualisation-server.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Self, TextIO
from urllib.parse import quote, unquote

from vmctl.client import Client, CommandError
from vmctl.guest.agent import AgentError
from vmctl.guest.copying import copy_contents_in, copy_file_in, copy_file_out, copy_tree_out
from vmd.shared.paths import client_socket
from vmm_kvm.standard_streams import run_program
from vmm_kvm.text import printable
from vmm_pytest.machine import Machine, MachineError
from vmm_pytest.run import NoMachinesError, Run, RunError
from vmm_pytest.templates import Template, Templates, adopt, run_vmctl

CAPABILITIES = ("revert", "revert-full-system", "root-on-testbed", "isolation-machine", "reboot")
EXIT_FAILED = 16
"""As of autopkgtest's own servers: an error that is not the tests'."""
_TIMEOUT_S = 600.0
_AGAIN_S = 0.2
_LINE_MAX = 1 << 20
_REBOOT = "(sleep 1; systemctl reboot || reboot) >/dev/null 2>&1 &"
_SCRATCH = (
    "mkdir -p /var/tmp && d=$(mktemp -d /var/tmp/autopkgtest.XXXXXX) && chmod 1777 $d && echo $d"
)


class ServerError(Exception):
    """The server cannot continue; `str()` is one line."""


class _EndError(BaseException):
    """A signal ends the server."""


class Server:
    """The states and commands of the protocol; a context manager, which closes the testbed."""

    def __init__(
        self,
        daemon: str,
        make: Callable[[], Machine],
        *,
        users: Sequence[str] = (),
        reboot: str = _REBOOT,
        timeout: float = _TIMEOUT_S,
    ) -> None:
        """Begin closed; `make` returns a machine that is ready.

        `users` are suggested for tests, `reboot` is a shell command of the guest.
        """
        self._daemon = daemon
        self._make = make
        self._users = users
        self._reboot = reboot
        self._timeout = timeout
        self._machine: Machine | None = None
        self._scratch = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def serve(self, commands: TextIO, answers: TextIO) -> None:
        """Obey commands until `quit`.

        Raises:
            ServerError: one is unknown or fails, or the caller has gone.
        """
        answer = ["ok"]
        while True:
            print(*answer, file=answers, flush=True)
            line = commands.readline(_LINE_MAX)
            if not line.endswith("\n"):
                raise ServerError("the caller has gone")
            name, *words = line.split() or [""]
            if name == "quit":
                self._close()
                with suppress(BrokenPipeError):  # autopkgtest does not read this answer
                    os.write(answers.fileno(), b"ok\n")
                return
            try:
                given = [unquote(word, errors="surrogateescape") for word in words]
                answer = ["ok", *self._obey(name, given)]
            except (CommandError, MachineError, TimeoutError, OSError) as err:
                raise ServerError(f"{name}: {err}") from err

    def _obey(self, name: str, words: list[str]) -> list[str]:
        match name, words:
            case "capabilities", []:
                return [*CAPABILITIES, *(f"suggested-normal-user={one}" for one in self._users)]
            case "open", [] if self._machine is None:
                return self._open()
            case "revert", [] if self._machine:
                self._close()
                return self._open()
            case "reboot", [] if self._machine:
                return self._restart(self._machine)
            case "close", [] if self._machine:
                self._close()
                return []
            case "print-execute-command", [] if self._machine:
                return [",".join(map(quote, self._command(self._machine)))]
            case "copydown", [source, target] if self._machine:
                self._copy_down(self._machine, source, target)
                return []
            case "copyup", [source, target] if self._machine:
                self._copy_up(self._machine, source, target)
                return []
        raise ServerError(f"cannot do this now: {printable(' '.join((name, *words)))}")

    def _open(self) -> list[str]:
        self._machine = self._make()
        self._scratch = self._machine.succeed(_SCRATCH, timeout=self._timeout).strip()
        return [quote(self._scratch)]

    def _close(self) -> None:
        machine, self._machine = self._machine, None
        if machine:
            machine.close()

    def _restart(self, machine: Machine) -> list[str]:
        deadline = time.monotonic() + self._timeout
        before = self._pid(machine)
        with suppress(AgentError):  # the guest may be faster than the answer
            machine.agent.run(["/bin/sh", "-c", self._reboot], timeout=self._timeout)
        while self._pid(machine) in {before, None} or not self._answers(machine):
            if time.monotonic() >= deadline:
                raise TimeoutError("the testbed has not rebooted")
            time.sleep(_AGAIN_S)
        scratch = quote(self._scratch)
        machine.succeed(f"mkdir -p {scratch} && chmod 1777 {scratch}", timeout=self._timeout)
        return [scratch]

    def _pid(self, machine: Machine) -> int | None:
        with Client(self._daemon) as client:
            vm = client.vm(machine.name)
        if vm is None:
            raise ServerError("the testbed has ended")
        return vm.pid

    @staticmethod
    def _answers(machine: Machine) -> bool:
        try:
            machine.agent.ping(timeout=_AGAIN_S * 10)
        except (AgentError, TimeoutError):
            return False
        return True

    def _command(self, machine: Machine) -> list[str]:
        vmctl = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "vmctl")
        if not os.path.exists(vmctl):
            vmctl = shutil.which("vmctl") or "vmctl"
        return ["env", f"VMD_SOCKET={self._daemon}", vmctl, "exec", "-i", machine.name, "--"]

    @staticmethod
    def _copy_down(machine: Machine, source: str, target: str) -> None:
        if source.endswith("/"):
            machine.agent.run(["mkdir", "-p", "--", target])
            copy_contents_in(machine.agent, source, target)
        else:
            copy_file_in(machine.agent, source, target)

    @staticmethod
    def _copy_up(machine: Machine, source: str, target: str) -> None:
        if not source.endswith("/"):
            copy_file_out(machine.agent, source, target)
            return
        os.makedirs(target, exist_ok=True)
        for line in copy_tree_out(machine.agent, f"{source}.", target):
            print(f"{_NAME}: {line}", file=sys.stderr)


_NAME = "autopkgtest-virt-vmm"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_NAME, description="VMs as testbeds of autopkgtest")
    add = parser.add_argument
    add("image", nargs="?", help="disk of the template that is booted, [raw:|qcow2:]path[,ro]")
    add("--kernel", help="its kernel; without one, the disk boots")
    add("--initrd", help="its initial RAM disk")
    add("--append", help="its kernel command line")
    add("-m", "--memory", default="1G", help="its memory (%(default)s)")
    add("-p", "--cpus", type=int, default=1, help="its processors (%(default)s)")
    add("-L", "--network", action="store_true", help="a local network interface")
    add("--template", help="clone this paused template of a running vmd instead")
    add("--from", dest="snapshot", help="go on from this snapshot of a running vmd instead")
    add("--socket", help="of the running vmd")
    add("--user", action="append", default=[], help="a user to run tests as")
    add("--timeout", type=float, default=_TIMEOUT_S, help="seconds of a boot (%(default)s)")
    add("--reboot-command", default=_REBOOT, help="shell command of the guest")
    return parser


def _maker(given: argparse.Namespace, run: Run) -> Callable[[], Machine]:
    """Return what makes a testbed, with its template if there has to be one."""
    if given.template:
        return Template(run, given.template, run.agent_of, given.timeout).clone
    if given.snapshot:

        def start() -> Machine:
            name = run.new_name()
            run_vmctl(run, "start", "--from", given.snapshot, name, seconds=given.timeout)
            return adopt(run, name, run.agent_of, given.timeout)

        return start
    names = ("image", "kernel", "initrd", "append", "memory", "cpus", "network", "timeout")
    settings = {name: getattr(given, name) for name in names}
    templates = Templates(run, run.agent_of, Path.cwd())
    return lambda: templates.get(**settings).clone()


def main() -> None:
    """Serve autopkgtest; exits with its status."""
    run_program(_NAME, _serve)


def _serve() -> int:
    given = _parser().parse_args()
    is_running = given.template or given.snapshot or given.socket
    daemon = (given.socket or client_socket(os.environ)) if is_running else None
    # The daemon, and vmctl, find their modules where this program does.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))

    def end(_number: int, _frame: FrameType | None) -> None:
        raise _EndError

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, end)
    try:
        with ExitStack() as stack:
            run = stack.enter_context(Run(daemon=daemon))
            server = Server(
                run.daemon,
                _maker(given, run),
                users=given.user,
                reboot=given.reboot_command,
                timeout=given.timeout,
            )
            stack.enter_context(server).serve(sys.stdin, sys.stdout)
    except (ServerError, NoMachinesError, RunError) as err:
        print(f"{_NAME}: {err}", file=sys.stderr)
        return EXIT_FAILED
    except _EndError:
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    main()
