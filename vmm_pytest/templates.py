"""Templates: machines that are booted once for a run, and stay paused for their clones."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from vmctl.client import Client, CommandError, RefusedError, opened, text_of
from vmctl.guest.access import pauses
from vmctl.guest.agent import Agent, AgentError
from vmctl.guest.renewal import renew
from vmm_pytest.console import ConsoleLog
from vmm_pytest.machine import TIMEOUT_S, Machine, MachineError
from vmm_pytest.run import Run

_AGAIN_S = 0.1
_COPY_S = 600.0
_START_S = 120.0
_SHOWN = 2000


class Settings(NamedTuple):
    """The values of the marker."""

    image: str | os.PathLike[str] | None = None
    kernel: str | os.PathLike[str] | None = None
    initrd: str | os.PathLike[str] | None = None
    append: str | None = None
    memory: int | str = "512M"
    cpus: int = 1
    network: bool = False
    timeout: float = TIMEOUT_S


class FindAgent(Protocol):
    """How to reach the agent of a VM, by its name."""

    def __call__(self, name: str, /) -> Agent:
        """Return it; nothing is connected yet."""


class MakeMachine(Protocol):
    """How to make a machine."""

    def __call__(self, **given: object) -> Machine:
        """Return one of these Settings."""


class MakeTemplate(Protocol):
    """How to make a template."""

    def __call__(self, **given: object) -> "Template":
        """Return that of these Settings."""


class Template(NamedTuple):
    """A machine that is paused for its clones."""

    run: Run
    name: str
    """The VM's."""
    agent_of: FindAgent
    timeout: float

    def clone(self, on_made: Callable[[Machine], None] = lambda _: None) -> Machine:
        """Return a clone that is ready: nothing that it draws is what another one does.

        `on_made` gets it before that is so, and has to close it.

        Raises:
            MachineError: it cannot be cloned, or is not ready in time.
        """
        __tracebackhide__ = True
        name = self.run.new_name()
        deadline = time.monotonic() + self.timeout
        try:
            with Client(self.run.daemon) as client:
                self._ask(client, name, deadline)
        except CommandError as err:
            raise MachineError(f"{name}: not cloned: {err}") from None
        return adopt(self.run, name, self.agent_of, self.timeout, on_made)

    def _ask(self, client: Client, name: str, deadline: float) -> None:
        """Make a clone, as soon as the template's state is not being taken for another process."""
        while True:
            try:
                fields = {"name": self.name, "clone": name, "count": 1}
                (vm,) = client.ask("clone", "cloned", fields)["vms"]
            except RefusedError as err:
                if err.code != "EALREADY" or time.monotonic() + _AGAIN_S >= deadline:
                    raise
                time.sleep(_AGAIN_S)
                continue
            if vm["code"]:
                raise RefusedError(vm["code"], vm["message"])
            return


def adopt(
    run: Run,
    name: str,
    agent_of: FindAgent,
    timeout: float,
    on_made: Callable[[Machine], None] = lambda _: None,
) -> Machine:
    """Return the machine of a VM that is a copy of another; see `Template.clone`.

    Raises:
        MachineError: it is not ready in time.
    """
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout
    try:
        with Client(run.daemon) as client:
            client.send("console", {"name": name})
            console = ConsoleLog(opened(client)[0])
    except CommandError as err:
        raise MachineError(f"{name}: no console: {err}") from None
    machine = Machine(run.daemon, name, agent_of(name), console, timeout)
    on_made(machine)
    try:
        renew(machine.agent, name, deadline)
    except (CommandError, TimeoutError) as err:
        machine.close()
        raise MachineError(f"{name}: the clone cannot be made another one: {err}") from None
    return machine


class Templates:
    """The templates of a run. Each is built once, by the first process that needs it."""

    def __init__(self, run: Run, agent_of: FindAgent, root: Path) -> None:
        """Begin; relative paths are below `root`."""
        self._run = run
        self._agent_of = agent_of
        self._root = root

    def get(self, **given: object) -> Template:
        """Return the template of these Settings; it is built if there is none.

        Raises:
            MachineError: the settings make no sense, or it does not get ready.
        """
        __tracebackhide__ = True
        unknown = given.keys() - set(Settings._fields)
        if unknown:
            known = ", ".join(Settings._fields)
            raise MachineError(f"vm: unknown: {', '.join(sorted(unknown))} (there is {known})")
        settings = Settings(**given)  # type: ignore[arg-type] # as a test says
        if settings.kernel is None and settings.image is None:
            raise MachineError("vm: no kernel, and no image: use the marker vm, or --vm-image")
        words = self._words(settings)
        key = self._key(settings, words)
        name = f"{self._run.name}-template-{key}"
        with self._run.locked(f"template-{key}"), Client(self._run.daemon) as client:
            found = client.vm(name)
            if found is None or found.state != "paused":
                if found is not None:  # its builder was killed
                    client.stop(name, force=True)
                self._build(client, name, [*words, *self._disk(settings, key)], settings.timeout)
        return Template(self._run, name, self._agent_of, settings.timeout)

    def _words(self, settings: Settings) -> list[str]:
        """Return the options of `vmctl start`, but for the disk."""
        words = ["-m", str(settings.memory), "-p", str(settings.cpus)]
        if settings.kernel is not None:
            words += ["-b", self._path(settings.kernel)]
        if settings.initrd is not None:
            words += ["--initrd", self._path(settings.initrd)]
        if settings.append is not None:
            words += ["--append", settings.append]
        return [*words, *(["-L"] if settings.network else [])]

    def _path(self, path: str | os.PathLike[str]) -> str:
        return str(self._root / path)

    def _key(self, settings: Settings, words: list[str]) -> str:
        """Return what differs for templates that differ: settings, and contents of files."""
        __tracebackhide__ = True
        files = [settings.kernel, settings.initrd]
        if settings.image is not None:
            words = [*words, "-d", str(settings.image)]
            files.append(self._split(settings.image)[1])
        found = []
        for file in files:
            if file is not None:
                try:
                    told = os.stat(self._path(file))
                except OSError as err:
                    raise MachineError(f"vm: {file}: {err.strerror}") from None
                found.append((told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns))
        return hashlib.sha256(json.dumps([words, found]).encode()).hexdigest()[:8]

    def _split(self, image: str | os.PathLike[str]) -> tuple[str, str, bool]:
        """Return the prefix of an image's format, its path, and whether it is read-only."""
        text = os.fspath(image)
        is_read_only = text.endswith(",ro")
        text = text.removesuffix(",ro")
        kind, colon, path = text.partition(":")
        if colon and kind in {"raw", "qcow2"}:
            return f"{kind}:", path, is_read_only
        return "", text, is_read_only

    def _disk(self, settings: Settings, key: str) -> list[str]:
        """Return the option for the disk: what can be written to is a copy, for this run."""
        __tracebackhide__ = True
        if settings.image is None:
            return []
        kind, path, is_read_only = self._split(settings.image)
        path = self._path(path)
        if is_read_only:
            return ["-d", f"{kind}{path.replace(',', ',,')},ro"]
        copy = self._run.folder / f"disk-{key}.raw"
        copy.unlink(missing_ok=True)
        run_vmctl(self._run, "create", "-i", f"{kind}{path}", f"raw:{copy}", seconds=_COPY_S)
        return ["-d", f"raw:{copy}"]

    def _build(self, client: Client, name: str, words: list[str], seconds: float) -> None:
        __tracebackhide__ = True
        deadline = time.monotonic() + seconds
        words = ["start", "--template", "--vsock", "auto", *words, name]
        run_vmctl(self._run, *words, seconds=_START_S)
        console = None
        try:
            client.send("console", {"name": name})
            console = ConsoleLog(opened(client)[0])
            self._await_agent(name, deadline)
            client.pause(name)
        except (CommandError, TimeoutError) as err:
            shown = console.text()[-_SHOWN:] if console is not None else ""
            if client.vm(name) is not None:
                client.stop(name, force=True)
            text = f"its console ends with:\n{shown}" if shown else "its console has shown nothing"
            by = f"it was started by: {shlex.join(['vmctl', *words])}"
            raise MachineError(f"{name}: not ready: {err}\n{by}\n{text}") from None
        finally:
            if console is not None:
                console.close()

    def _await_agent(self, name: str, deadline: float) -> None:
        agent = self._agent_of(name)
        for pause in pauses():
            try:
                agent.ping(timeout=max(0.0, deadline - time.monotonic()))
            except AgentError as err:  # not yet there
                if time.monotonic() + pause >= deadline:
                    raise TimeoutError(str(err)) from None
                time.sleep(pause)
            else:
                return


def run_vmctl(run: Run, *words: str, seconds: float) -> None:
    """Run vmctl for the daemon of a run.

    Raises:
        MachineError: it fails, and with its message.
    """
    __tracebackhide__ = True
    done = subprocess.run(
        [sys.executable, "-m", "vmctl", *words],
        env={**os.environ, "VMD_SOCKET": run.daemon},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )
    if done.returncode:
        text = done.stderr.strip() or text_of("command-failed")
        raise MachineError(f"vmctl {' '.join(words)}: {text}")
