"""The verbs that speak with the daemon, declared for typer. What they do is in `vmctl.verbs`."""

import sys
from typing import Annotated

import typer

from vmctl.verbs import VERBS, Values, perform, usage

_Words = Annotated[list[str] | None, typer.Argument(metavar="[id]", show_default=False)]
_Nothing = Annotated[list[str] | None, typer.Argument(hidden=True, show_default=False)]
_File = Annotated[list[str] | None, typer.Argument(metavar="filename", show_default=False)]
_Level = Annotated[
    list[str] | None, typer.Argument(metavar="[brief | verbose]", show_default=False)
]
_Mode = Annotated[
    list[str] | None, typer.Argument(metavar="[all | switches | vms]", show_default=False)
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Running = Annotated[bool, typer.Option("-r", help="Only VMs that run.")]
_List = list[str] | None


def add_vm_commands(app: typer.Typer) -> None:
    """Declare the verbs."""
    for function in (
        *(_console, _events, _load, _log, _pause, _receive, _reload, _reset, _send, _show),
        *(_start, _status, _stop, _top, _unpause, _wait),
    ):
        app.command(function.__name__.removeprefix("_"))(function)


def _do(name: str, words: list[str] | None, values: Values) -> None:
    given = words or []
    fewest, most = VERBS[name].words
    fits = fewest <= len(given) <= most
    if name == "stop":
        fits = len(given) <= 1 and bool(values["every"]) != bool(given)
    status = perform(name, values, given) if fits else None
    if status is None:
        print(usage(name), file=sys.stderr)
        status = 1
    raise typer.Exit(status)


def _console(words: _Words = None) -> None:
    """Attach to a VM's console; ~. leaves it."""
    _do("console", words, {})


def _events(words: _Nothing = None, as_json: _Json = False) -> None:
    """Print what happens to VMs, as it happens."""
    _do("events", words, {"as_json": as_json})


def _load(words: _File = None) -> None:
    """Let the daemon read another configuration file in addition."""
    _do("load", words, {})


def _log(words: _Level = None) -> None:
    """Let the daemon log little or much."""
    _do("log", words, {})


def _pause(words: _Words = None) -> None:
    """Let a VM stand still."""
    _do("pause", words, {})


def _receive(words: _Words = None) -> None:
    """Receive a VM that was sent; not supported yet."""
    _do("receive", words, {})


def _reload(words: _Nothing = None) -> None:
    """Let the daemon read its configuration again; VMs that run stay as they are."""
    _do("reload", words, {})


def _reset(words: _Mode = None) -> None:
    """End all VMs, or forget switches, or both."""
    _do("reset", words, {})


def _send(words: _Words = None) -> None:
    """Send a VM to another host; not supported yet."""
    _do("send", words, {})


def _show(words: _Words = None, running: _Running = False, as_json: _Json = False) -> None:
    """List VMs, as status does, and the network interfaces of one."""
    _do("show", words, {"running": running, "as_json": as_json})


def _status(words: _Words = None, running: _Running = False, as_json: _Json = False) -> None:
    """List VMs."""
    _do("status", words, {"running": running, "as_json": as_json})


def _start(  # noqa: PLR0917 - typer passes them by name
    words: _Words = None,
    boot_device: Annotated[
        _List, typer.Option("-B", metavar="device", help="Boot from disk, cdrom or net.")
    ] = None,
    boot: Annotated[
        _List, typer.Option("-b", metavar="path", help="Kernel or firmware to boot.")
    ] = None,
    console: Annotated[bool, typer.Option("-c", help="Attach the console.")] = False,
    disks: Annotated[
        _List,
        typer.Option(
            "-d",
            metavar="[format:]disk[,option...]",
            help="Disk image; may be repeated. Options: ro, serial=text, queues=count.",
        ),
    ] = None,
    interfaces: Annotated[
        _List, typer.Option("-i", metavar="count", help="Number of network interfaces.")
    ] = None,
    local: Annotated[
        int, typer.Option("-L", count=True, help="Add a local network interface.")
    ] = 0,
    memory: Annotated[_List, typer.Option("-m", metavar="size", help="Memory.")] = None,
    switches: Annotated[
        _List,
        typer.Option("-n", metavar="switch", help="Add a network interface on a switch."),
    ] = None,
    cpus: Annotated[_List, typer.Option("-p", metavar="count", help="Number of vCPUs.")] = None,
    cdrom: Annotated[
        _List, typer.Option("-r", metavar="path", help="ISO image in the CD-ROM drive.")
    ] = None,
    template: Annotated[
        _List, typer.Option("-t", metavar="name", help="Make an instance of this VM.")
    ] = None,
    append: Annotated[
        _List, typer.Option("--append", metavar="string", help="Kernel command line.")
    ] = None,
    firmware: Annotated[
        _List, typer.Option("--firmware", metavar="bios|uefi|path", help="Boot firmware.")
    ] = None,
    initrd: Annotated[
        _List, typer.Option("--initrd", metavar="path", help="Initial RAM disk.")
    ] = None,
) -> None:
    """Start a VM that exists, or make one and start it."""
    given = {
        "boot_device": boot_device,
        "boot": boot,
        "disks": disks,
        "interfaces": interfaces,
        "memory": memory,
        "switches": switches,
        "cpus": cpus,
        "cdrom": cdrom,
        "template": template,
        "append": append,
        "firmware": firmware,
        "initrd": initrd,
    }
    values: Values = {name: tuple(value) for name, value in given.items() if value}
    _do("start", words, {**values, "console": console, "local": local})


def _stop(
    words: _Words = None,
    force: Annotated[bool, typer.Option("-f", help="Without asking the guest.")] = False,
    wait: Annotated[bool, typer.Option("-w", help="Wait until it has ended.")] = False,
    every: Annotated[bool, typer.Option("-a", help="Every VM that runs.")] = False,
) -> None:
    """Stop a VM."""
    _do("stop", words, {"force": force, "wait": wait, "every": every})


def _top(
    words: _Nothing = None,
    delay: Annotated[
        str, typer.Option("-d", metavar="seconds", help="Time between two looks.")
    ] = "1",
    count: Annotated[
        str | None, typer.Option("-n", metavar="count", help="How often to look.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Show what VMs use, again and again."""
    _do("top", words, {"delay": delay, "count": count, "as_json": as_json})


def _unpause(words: _Words = None) -> None:
    """Let a paused VM go on."""
    _do("unpause", words, {})


def _wait(
    words: _Words = None,
    until: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="condition", help="running, stopped, or console=text, instead."
        ),
    ] = None,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="seconds", help="Wait no longer.")
    ] = None,
) -> None:
    """Wait until a VM ends or reboots."""
    _do("wait", words, {"until": until, "timeout": timeout})
