"""The command line of `vmctl run`, and a short way to read it.

`vmctl.cli` declares it for typer, which explains, completes and refuses. Importing typer takes as
long as a third of all else that happens before a guest runs, so that a command line that is plain
and right is read here.
"""

from collections.abc import Sequence
from typing import NamedTuple


class RunOptions(NamedTuple):
    """The command line of `vmctl run`, as typed."""

    boot: str | None = None
    selftest: bool = False
    memory: str = "512M"
    cpus: str = "1"
    disks: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    local: bool = False
    cdrom: str | None = None
    boot_device: str | None = None
    firmware: str | None = None
    nvram: str | None = None
    virtio_console: bool = False
    initrd: tuple[str, ...] = ()
    append: str | None = None
    timeout: str | None = None
    reboot: bool = True
    name: str = ""
    verbose: bool = False


_VALUES = {
    "-b": "boot",
    "-m": "memory",
    "-p": "cpus",
    "-r": "cdrom",
    "-B": "boot_device",
    "--firmware": "firmware",
    "--nvram": "nvram",
    "--append": "append",
    "--timeout": "timeout",
}
_LISTS = {"-d": "disks", "-i": "interfaces", "-n": "switches", "--initrd": "initrd"}
_FLAGS = {
    "--selftest": {"selftest": True},
    "--virtio-console": {"virtio_console": True},
    "--no-reboot": {"reboot": False},
    "-c": {},
    "-L": {"local": True},
}


def read_plainly(arguments: Sequence[str]) -> RunOptions | None:
    """Read what follows `vmctl run`; None for what has to be left to typer.

    That is: whatever is wrong, asks for help, or is written in one of the rarer ways that typer
    takes, such as `-m256M` or a name before the options.
    """
    fields = RunOptions()._asdict()
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        option, has_value, value = rest.pop(0).partition("=")
        if option in _FLAGS and not has_value:
            fields |= _FLAGS[option]
            continue
        if not has_value or not option.startswith("--"):
            if has_value or not rest or rest[0].startswith("-"):
                return None
            value = rest.pop(0)
        if option in _VALUES:
            fields[_VALUES[option]] = value
        elif option in _LISTS:
            fields[_LISTS[option]] += (value,)
        else:
            return None
    if len(rest) > 1:
        return None
    fields["name"] = "".join(rest)
    return RunOptions(**fields)
