"""User ids of one daemon alone: for its control process, its zygote, each VM, and each TPM.

They lie in a range that no account has. Several daemons may use one range: each leases a part of
it, for as long as any of its processes lives, so that a daemon started after another was killed
shares no uid with a disk process that still writes back. Group ids are the same numbers.
"""

import fcntl
import os
from contextlib import suppress
from typing import NamedTuple

PARTS = 16
"""Parts of a range, each for one daemon."""
_PART_MIN = 64
_UID_MAX = (1 << 32) - 2
_LOCK = "/run/vmd-uids-"


class UidsError(Exception):
    """No uids are available; the message is one line."""


class UidRange(NamedTuple):
    """Numbers from `first` on; `size` is a power of two that divides `first`.

    So one masked comparison, which is all that a system call filter has, tests membership.
    """

    first: int
    size: int

    @property
    def mask(self) -> int:
        """The bits in which a number of the range equals `first`."""
        return ~(self.size - 1) & 0xFFFF_FFFF

    def __str__(self) -> str:
        return f"{self.first} to {self.first + self.size - 1}"


UIDS_DEFAULT = UidRange(0x7F00_0000, 0x1_0000)
"""2130706432 to 2130771967: unused by the table of systemd.io/UIDS-GIDS, above the subordinate ids
of shadow (up to 600100000) and the ids that sssd makes (up to 2000200000), and positive in a
signed number."""


class Uids(NamedTuple):
    """The part of a range that a daemon has leased; see `lease`."""

    part: UidRange
    fd: int
    """The lease: it ends when no process has this descriptor any more."""

    @property
    def control(self) -> int:
        """Of the control process."""
        return self.part.first

    @property
    def zygote(self) -> int:
        """Of the zygote."""
        return self.part.first + 1

    @property
    def vms(self) -> range:
        """For VMs: all processes of one VM have the same uid, and no others have it."""
        return range(self.part.first + 2, self.tpms.start)

    @property
    def tpms(self) -> range:
        """For the swtpm processes of VMs that have a TPM: the last quarter."""
        end = self.part.first + self.part.size
        return range(end - self.part.size // 4, end)


def parse_range(text: str) -> UidRange:
    """Read a range, `first:count`.

    Raises:
        UidsError: it is none, or one that no filter can express.
    """
    first_text, _, count_text = text.partition(":")
    if not (text.isascii() and first_text.isdecimal() and count_text.isdecimal()):
        raise UidsError(f"uids {text}: not first:count")
    found = UidRange(int(first_text), int(count_text))
    smallest = PARTS * _PART_MIN
    if found.size < smallest or found.size & (found.size - 1):
        raise UidsError(f"uids {text}: the count is no power of two from {smallest} on")
    if found.first == 0 or found.first % found.size:
        raise UidsError(f"uids {text}: the first is no multiple of {found.size}")
    if found.first + found.size - 1 > _UID_MAX:
        raise UidsError(f"uids {text}: beyond {_UID_MAX}")
    return found


def lease(whole: UidRange, lock: str = _LOCK) -> Uids:
    """Lease a part of a range, for root; the caller owns the descriptor.

    The files that begin with `lock` are locked, and stay.

    Raises:
        UidsError: all parts are leased, or these are no ids of this user namespace.
    """
    for name in ("uid_map", "gid_map"):
        if not _is_mapped(whole, name):
            raise UidsError(f"uids {whole}: not in this user namespace (choose others by --uids)")
    size = whole.size // PARTS
    for first in range(whole.first, whole.first + whole.size, size):
        flags = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(f"{lock}{first}", flags, 0o600)
        except OSError as err:
            raise UidsError(f"{lock}{first}: {err.strerror}") from err
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Uids(UidRange(first, size), fd)
        os.close(fd)
    raise UidsError(f"uids {whole}: all are in use by other daemons (choose others by --uids)")


def _is_mapped(wanted: UidRange, name: str) -> bool:
    """Tell whether ids can be used here. Source: user_namespaces(7), "uid_map"."""
    with open(f"/proc/self/{name}", encoding="ascii") as file:  # noqa: PTH123 - the plainest way
        for line in file:
            first, _, count = map(int, line.split())
            if first <= wanted.first and wanted.first + wanted.size <= first + count:
                return True
    return False
