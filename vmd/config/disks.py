"""Disks as a user writes them on a command line.

    [kind:]path[,option]...

Kinds:

    (none)       an image file; its format is found out
    raw:         an image file, every byte of which is the disk's
    qcow2:       a qcow2 image
    vhost-user:  the socket of a server that has the disk
    pmem:        an image file that is memory of the guest

Options, of which a comma in the path is told apart by writing it twice:

    ro           read-only
    serial=TEXT  identity that the guest reads, at most 20 bytes
    queues=N     request queues, 1 to 64
    process      serve it by a process of its own
    snapshot     what the guest writes goes to a file without a name, and vanishes with the VM
    error=WHAT   when the host cannot read or write: stop pauses the VM, report tells the guest
    private      (pmem) what the guest writes vanishes when it powers off

A path that begins like a kind is written with `./` in front.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from vmm_kvm.limits import DISK_QUEUES_MAX, DISK_SERIAL_MAX


class DiskKind(StrEnum):
    """The part before the colon."""

    PROBE = ""
    RAW = "raw"
    QCOW2 = "qcow2"
    VHOST_USER = "vhost-user"
    PMEM = "pmem"


class OnError(StrEnum):
    """The reaction when the host cannot read or write a disk."""

    STOP = "stop"
    """The VM is paused, and the request is tried again when it is unpaused."""
    REPORT = "report"
    """The guest is told."""


class DiskError(ValueError):
    """A disk that cannot be understood; the message is one line."""


class DiskOption(NamedTuple):
    """One disk, as it was asked for."""

    kind: DiskKind
    path: str
    is_read_only: bool = False
    serial: str = ""
    queues: int = 1
    is_process: bool = False
    is_private: bool = False
    is_snapshot: bool = False
    on_error: OnError | None = None
    """None: as the program has it that runs the VM."""
    window: tuple[int, int] | None = None
    """The part of the file that is the disk, of a snapshot: where it begins, and its size."""


_IMAGES = frozenset({DiskKind.PROBE, DiskKind.RAW, DiskKind.QCOW2})
# The kinds for which each option makes sense.
_KINDS = {
    "ro": _IMAGES,
    "serial": _IMAGES,
    "queues": _IMAGES,
    "process": _IMAGES,
    "snapshot": _IMAGES,
    "error": _IMAGES,
    "private": frozenset({DiskKind.PMEM}),
}
OPTIONS = frozenset(_KINDS)
"""Words of the options."""
OPTIONS_WITH_VALUE = frozenset({"serial", "queues", "error"})
_COMMA = ",,"


def writes_image(disk: DiskOption) -> bool:
    """Tell whether the guest's writes reach the file at the disk's path."""
    return not (disk.is_read_only or disk.is_private or disk.is_snapshot)


def parse_disk(text: str) -> DiskOption:
    """Read a disk.

    Raises:
        DiskError: the path is missing, an option is unknown or does not fit, or a value is wrong.
    """
    prefix, colon, rest = text.partition(":")
    kind = DiskKind(prefix) if colon and prefix and prefix in set(DiskKind) else DiskKind.PROBE
    path, *options = _split(rest if kind is not DiskKind.PROBE else text)
    if not path:
        raise DiskError(f"invalid disk: {text}: no path")
    disk = DiskOption(kind, path)
    for option in options:
        word, equals, value = option.partition("=")
        if word not in OPTIONS or bool(equals) != (word in OPTIONS_WITH_VALUE):
            raise DiskError(f"invalid disk: {text}: unknown option {option!r} ({_known()})")
        try:
            disk = with_option(disk, word, value)
        except DiskError as err:
            raise DiskError(f"invalid disk: {text}: {err}") from None
    return disk


def check_distinct(disks: Sequence[DiskOption]) -> None:
    """Refuse one image as two disks, unless the guest only reads both; paths are resolved.

    Raises:
        DiskError: there is one; the message names it.
    """
    seen: dict[str, bool] = {}
    for disk in disks:
        if disk.kind is DiskKind.VHOST_USER:
            continue
        is_read = not writes_image(disk)
        if disk.path in seen and not (is_read and seen[disk.path]):
            raise DiskError(f"{disk.path}: the same disk twice")
        seen[disk.path] = is_read


def _known() -> str:
    """Return the options, for a message."""
    words = [f"{word}=" if word in OPTIONS_WITH_VALUE else word for word in _KINDS]
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _split(text: str) -> list[str]:
    """Split at single commas; two in a row stand for one in the text."""
    parts = [""]
    at = 0
    while at < len(text):
        if text.startswith(_COMMA, at):
            parts[-1] += ","
            at += 2
        elif text[at] == ",":
            parts.append("")
            at += 1
        else:
            parts[-1] += text[at]
            at += 1
    return parts


def with_option(disk: DiskOption, word: str, value: str = "") -> DiskOption:
    """Add an option, one of OPTIONS, to a disk.

    Raises:
        DiskError: the option does not fit this kind of disk, or its value is wrong.
    """
    if disk.kind not in _KINDS[word]:
        raise DiskError(f"{word} is not for {disk.kind or 'image'} disks")
    match word:
        case "ro":
            return disk._replace(is_read_only=True)
        case "process":
            return disk._replace(is_process=True)
        case "snapshot":
            return disk._replace(is_snapshot=True)
        case "private":
            return disk._replace(is_private=True)
        case "error":
            if value not in set(OnError):
                raise DiskError("error is stop or report")
            return disk._replace(on_error=OnError(value))
        case "serial":
            if len(value.encode(errors="surrogateescape")) > DISK_SERIAL_MAX:
                raise DiskError(f"serial of more than {DISK_SERIAL_MAX} bytes")
            return disk._replace(serial=value)
        case _:
            # No more digits than int() takes.
            is_number = value.isascii() and value.isdecimal()
            is_number = is_number and len(value) <= len(str(DISK_QUEUES_MAX))
            if not is_number or not 1 <= int(value) <= DISK_QUEUES_MAX:
                raise DiskError(f"queues are 1 to {DISK_QUEUES_MAX}")
            return disk._replace(queues=int(value))
