"""Values of options that `vmctl run` and `vmctl start` share, read alike, in OpenBSD's words."""

from collections.abc import Sequence

from vmctl.messages import bytes_hint, fail
from vmctl.moment import seconds_in
from vmd.config.sizes import SizeError, fmt_scaled, scan_scaled
from vmm_kvm.errors import SpecError
from vmm_kvm.limits import MEMORY_MAX, MEMORY_MIN, VCPUS_MAX
from vmm_kvm.record import Record

_DIGITS_MAX = 100


class VmOptions(Record):
    """Options that say the same in `vmctl start` and `vmctl run`, as typed.

    Those that may come once are tuples too: whoever reads them refuses a second.
    """

    boot: tuple[str, ...] = ()
    boot_device: tuple[str, ...] = ()
    selftest: bool = False
    memory: tuple[str, ...] = ()
    cpus: tuple[str, ...] = ()
    disks: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()
    """-i"""
    local: int = 0
    """How many -L."""
    switches: tuple[str, ...] = ()
    forwards: tuple[str, ...] = ()
    cdrom: tuple[str, ...] = ()
    initrd: tuple[str, ...] = ()
    append: tuple[str, ...] = ()
    firmware: tuple[str, ...] = ()
    vsock: tuple[str, ...] = ()
    cloud_init: tuple[str, ...] = ()
    ssh_keys: tuple[str, ...] = ()
    agent: bool = False
    balloon: bool = False
    watchdog: bool = False
    console: bool = False
    """-c; `run` always attaches its console."""
    until: tuple[str, ...] = ()
    """--wait"""
    timeout: tuple[str, ...] = ()
    origin: tuple[str, ...] = ()
    """--from"""


def once(given: Sequence[str], what: str) -> str | None:
    """Return the value of an option that may come once.

    Raises:
        SpecError: it came more often.
    """
    if len(given) > 1:
        raise SpecError(f"{what} specified multiple times")
    return given[0] if given else None


def memory_of(text: str) -> int:
    """Read a size of memory; returns bytes, whole megabytes, and says so if it has to round.

    Raises:
        SpecError: it is none, or none that a VM can have.

    Source: section 3.6 of OpenBSD's behaviour.
    """
    try:
        size = scan_scaled(text)
    except SizeError as err:
        raise SpecError(f"invalid memory size: {text}: {err}") from err
    if size < MEMORY_MIN:
        raise SpecError(f"memory size must be at least 1MB{bytes_hint(text, 'M')}")
    if size > MEMORY_MAX:
        raise SpecError(f"memory size too large (limit is {MEMORY_MAX >> 30}G)")
    rounded = size - size % MEMORY_MIN
    if rounded != size:
        fail(f"memory size rounded to {fmt_scaled(rounded)}")
    return rounded


def cpus_of(text: str) -> int:
    """Read a number of vCPUs.

    Raises:
        SpecError: it is none, or too small or too large.
    """
    return number_of(text, "cpu count", VCPUS_MAX)


def number_of(text: str, what: str, largest: int) -> int:
    """Read a number from 1 to `largest`, which is called `what`.

    Raises:
        SpecError: it is none, or too small or too large.
    """
    digits = text.strip()
    digits = digits[1:] if digits[:1] in {"+", "-"} else digits
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > _DIGITS_MAX:
        raise SpecError(f"{what} is invalid: {text}")
    value = int(text)
    if not 1 <= value <= largest:
        raise SpecError(f"{what} is too {'small' if value < 1 else 'large'}: {text}")
    return value


def seconds_of(text: str) -> float:
    """Read a time-out; returns seconds, more than none.

    Raises:
        SpecError: it is none.
    """
    seconds = seconds_in(text)
    if not seconds:
        raise SpecError(f"invalid time-out: {text}: not a number of seconds")
    return seconds
