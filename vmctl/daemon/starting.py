"""Code of commands that have the daemon start a VM: passing files, and messages."""

import os
import stat
import sys

from vmctl.client import CommandError, Fields, RefusedError, text_of
from vmm_kvm.text import printable

TYPE_CHECKING = False  # as in `vmm_kvm.record`
if TYPE_CHECKING:  # loaded if there is a disk
    from vmd.config.disks import DiskOption

_OWN_TEXTS = {"bios-missing", "disk-missing", "cdrom-missing", "cdrom-invalid", "template-invalid"}


def why_not_started(err: RefusedError) -> str:
    """Return the lines about a VM that the daemon has not started."""
    text = text_of(err.code)
    known = text if err.code in _OWN_TEXTS else f"start vm command failed: {text}"
    return f"{known}\n{err.detail}".rstrip("\n")


def say_started(answer: Fields) -> None:
    """Print that a VM has started, from the daemon's answer."""
    text = f"started vm {answer['id']} successfully, tty {answer['tty']}"
    print(f"vmctl: {printable(text)}", file=sys.stderr)


def path_of(path: str, what: str) -> str:
    """Return the absolute path of a file that is there, without symbolic links."""
    try:
        return os.path.realpath(path, strict=True)
    except OSError as err:
        raise CommandError(f"invalid {what} path: {path}: {err.strerror}") from err


def shown(path: str) -> str:
    """Return a path as text for messages."""
    return os.fsencode(path).decode(errors="backslashreplace")


def open_file(
    path: str, what: str, fds: list[int], *, writes: bool = False, allows_devices: bool = False
) -> int:
    """Open a file for the daemon; returns its index among `fds`."""
    flags = (os.O_RDWR if writes else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path, flags)
    except OSError as err:
        raise CommandError(f"cannot open {what} '{path}': {err.strerror}") from err
    fds.append(fd)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not (allows_devices and stat.S_ISBLK(mode)):
        raise CommandError(f"{what} must be a regular file")
    return len(fds) - 1


def open_chain(disk: "DiskOption", fds: list[int]) -> list[int]:
    """Open an image and its bases for the daemon, which follows no path; returns their indices."""
    from vmd.config.disks import DiskKind, writes_image  # noqa: PLC0415 - only with disks
    from vmm_kvm.block.image import Format  # noqa: PLC0415 - same
    from vmm_kvm.errors import ImageError  # noqa: PLC0415 - same
    from vmm_kvm.images.opening import image_chain  # noqa: PLC0415 - same

    chain: list[int] = []

    def open_layer(path: str) -> int:
        what, writes = ("base image", False) if chain else ("disk", writes_image(disk))
        chain.append(open_file(path, what, fds, writes=writes, allows_devices=True))
        return fds[chain[-1]]

    said = None if disk.kind is DiskKind.PROBE else Format(disk.kind)
    try:
        image_chain(disk.path, said, open_layer)
    except ImageError as err:
        raise CommandError(f"{text_of('disk-missing')}\n{err}") from err
    return chain
