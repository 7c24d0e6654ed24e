"""What `vmd -n` says of a vm.conf, and what `vmd -D` takes."""

from collections.abc import Mapping

from vmd.config.host import Host
from vmd.config.parser import printable, read_config
from vmd.config.text import config_lines


def check(
    path: str,
    macros: Mapping[str, str],
    *,
    is_optional: bool = False,
    is_verbose: bool = False,
    host: Host | None = None,
) -> tuple[list[str], int]:
    """Return the lines of `vmd -n`, for standard error, and its exit status.

    Arguments are those of `parse_config`; `is_verbose` adds what was read. Disks, kernels and
    firmware have to be there; names, permissions and interfaces are not looked at.

    Source: section 4.6 of OpenBSD's behaviour.
    """
    reading = read_config(path, macros, is_optional=is_optional, host=host)
    lines = [f"vmd: {line}" for line in (*reading.notes, *reading.errors)]
    lines += reading.warnings[len(reading.notes) :]
    if not reading.errors:
        if is_verbose:
            text = config_lines(reading.config)
            lines += (printable(part) for line in text for part in line.split("\n"))
        lines.append("configuration OK")
    return lines, 1 if reading.errors else 0


def parse_macro(text: str) -> tuple[str, str] | None:
    """Read the argument of `-D`, `name=value`, divided at the last `=`; None if there is none."""
    name, equals, value = text.rpartition("=")
    return (name, value) if equals else None
