"""The output of `vmd -n` for a vm.conf, and the argument of `vmd -D`."""

from collections.abc import Callable, Mapping, Sequence

from vmd.config.advice import advice
from vmd.config.host import Host, SystemHost
from vmd.config.model import VmConfig
from vmd.config.parser import read_config, shown
from vmd.config.text import config_lines


def check(
    path: str,
    macros: Mapping[str, str],
    *,
    is_optional: bool = False,
    is_verbose: bool = False,
    is_user: bool = False,
    judge: Callable[[Sequence[VmConfig]], Sequence[str]] = lambda _vms: (),
    inspect: Callable[[Sequence[VmConfig]], Sequence[str]] = lambda _vms: (),
    host: Host | None = None,
) -> tuple[list[str], int]:
    """Return the lines of `vmd -n`, for standard error, and its exit status.

    Arguments are those of `parse_config`; `is_verbose` adds what was read. `judge` returns a line
    for each VM that the daemon would refuse to register, `inspect` one for each image that a VM
    could not use. Disks, kernels and firmware must exist;
    permissions and interfaces are not checked. `is_user`: it is for `vmd --user`.

    Source: section 4.6 of OpenBSD's behaviour.
    """
    host = host or SystemHost()
    reading = read_config(path, macros, is_optional=is_optional, host=host)
    errors = reading.errors or tuple(map(shown, judge(reading.config.vms)))
    lines = [f"vmd: {line}" for line in (*reading.notes, *errors)]
    lines += reading.warnings[len(reading.notes) :]
    lines += map(shown, advice(reading.config, is_user=is_user, memory_size=host.memory_size()))
    lines += map(shown, inspect(reading.config.vms))
    if not errors:
        if is_verbose:
            text = config_lines(reading.config)
            lines += (shown(part) for line in text for part in line.split("\n"))
        lines.append("configuration OK")
    return lines, 1 if errors else 0


def parse_macro(text: str) -> tuple[str, str] | None:
    """Read the argument of `-D`, `name=value`, divided at the last `=`; None if there is none."""
    name, equals, value = text.rpartition("=")
    return (name, value) if equals else None
