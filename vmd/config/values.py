"""Values in a vm.conf: their checks, and the complaints about wrong ones.

Source: sections 4.3 to 4.5 of OpenBSD's behaviour.
"""

import re

from vmd.config.model import Prefix
from vmd.config.sizes import SizeError, scan_scaled
from vmm_kvm.limits import INTERFACE_NAME_MAX, MEMORY_MAX, MEMORY_MIN
from vmm_kvm.net.ethernet import parse_lladdr
from vmm_kvm.net.inet import is_of_host

_MIB = 1 << 20
_IPV4 = 4
_TAP_UNIT_MAX = (1 << 32) - 1
_PREFIX4_BITS_MAX = 16
_LOOPBACK4 = 127
_CLASS_BITS = 8
"""Of the prefixes of addresses that no host has."""
_PREFIX4_BITS_DEFAULT = 16
_PREFIX6_BITS_MAX = 64
_PREFIX6_BITS_DEFAULT = 64
_NOT_NUMERIC = "name or service is not known"
_NO_ADDRESS = re.compile(r"00?(?::00?){5}")
_OCTETS = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){0,3}")
_INTERFACE = re.compile(r"[^\s/:]+")
_NO_INTERFACES = frozenset({".", "..", "all", "default"})
"""The last two are directories of settings, in /proc/sys/net/ipv4/conf."""
_NUMBER = re.compile(r"[-+]?[0-9]+")
_TAP = re.compile(r"tap[0-9]+")


class ValueRefusedError(ValueError):
    """A value that is wrong; the message is part of a line."""


def byte_length(text: str) -> int:
    """Return the length of a text in bytes, as in a file."""
    return len(text.encode("utf-8", "surrogateescape"))


def memory_of(size: int | str) -> int:
    """Return the bytes of RAM, a multiple of 1 MiB, for a number of bytes or a scaled size.

    Raises:
        ValueRefusedError: not a size, less than 1 MiB, or more than 128 GiB.
    """
    try:
        count = scan_scaled(size) if isinstance(size, str) else size
    except SizeError as err:
        raise ValueRefusedError(f"invalid memory size: {size}: {err}") from None
    if count < MEMORY_MIN:
        raise ValueRefusedError("memory size must be at least 1MB")
    if count > MEMORY_MAX:
        raise ValueRefusedError("memory size too large (limit is 128G)")
    return count // _MIB * _MIB


def lladdr_of(text: str) -> str | None:
    """Return an Ethernet address with two digits in each part; None for all zero, a random one.

    Raises:
        ValueRefusedError: not the address of a station.
    """
    if _NO_ADDRESS.fullmatch(text):
        return None
    try:
        return parse_lladdr(text).hex(":")
    except ValueError as err:
        raise ValueRefusedError(str(err)) from None


def tap_of(name: str) -> str | None:
    """Return the host's side of an interface; None for any.

    Raises:
        ValueRefusedError: neither `tap` nor `tap` and a number.
    """
    if name == "tap":
        return None
    if not _TAP.fullmatch(name) or _is_more(name[3:], _TAP_UNIT_MAX):
        raise ValueRefusedError(f"invalid interface: {name}")
    return interface_of(name)


def interface_of(name: str) -> str:
    """Return the name of an interface of the host, which Linux may take or not.

    Raises:
        ValueRefusedError: no interface can have it.
    """
    if not _can_be_interface(name):
        raise ValueRefusedError(f"invalid interface: {name}")
    if byte_length(name) > INTERFACE_NAME_MAX:
        raise ValueRefusedError(f"interface name too long: {name}")
    return name


def _can_be_interface(name: str) -> bool:
    """Tell whether a name, however long, has nothing in it that Linux refuses."""
    return bool(_INTERFACE.fullmatch(name)) and name not in _NO_INTERFACES and name.isprintable()


def bridge_of(name: str) -> str:
    """Return the interface of a switch, which is whatever Linux takes for a name of one.

    OpenBSD wants `bridge` or `veb` and a number; bridges of Linux have any name.

    Raises:
        ValueRefusedError: it cannot be the name of an interface.
    """
    if not _can_be_interface(name):
        raise ValueRefusedError(f"invalid switch interface: {name}")
    if byte_length(name) > INTERFACE_NAME_MAX:
        raise ValueRefusedError(f"switch interface too long: {name}")
    return name


def address_of(text: str) -> str:
    """Return an IPv4 or IPv6 address and the bits of its network, such as `10.0.0.1/24`.

    Raises:
        ValueRefusedError: it is none that a host can have.
    """
    from ipaddress import ip_interface  # noqa: PLC0415 - hardly any file has such an address

    try:
        found = ip_interface(text)
    except ValueError:
        raise ValueRefusedError(f"invalid address: {text}") from None
    if "/" not in text or "%" in text or not found.network.prefixlen:
        raise ValueRefusedError(f"invalid address: {text}")
    ends = {found.network.network_address, found.network.broadcast_address}
    is_end = found.version == _IPV4 and found.network.num_addresses > len(ends) and found.ip in ends
    if not is_of_host(found.packed) or found.ip.is_loopback or is_end:
        raise ValueRefusedError(f"invalid address: {text}: no host has it")
    return str(found)


def group_of(name: str) -> str | None:
    """Return an interface group; None for an empty name.

    Raises:
        ValueRefusedError: more than fifteen bytes, or a digit at the end.
    """
    if byte_length(name) > INTERFACE_NAME_MAX or name[-1:] in set("0123456789"):
        raise ValueRefusedError(f"invalid group name: {name}")
    return name or None


def prefix4_of(text: str) -> Prefix:
    """Read an IPv4 prefix, `100.64.0.0/10` or shorter, such as `10/8`; 16 bits if none are said.

    Raises:
        ValueRefusedError: not a prefix, of more than 16 bits, or with bits beyond the mask.
    """
    address, slash, mask = text.rpartition("/")
    bits = _bits(mask, 1, _PREFIX4_BITS_MAX) if slash else _PREFIX4_BITS_DEFAULT
    octets = (address if slash else text).split(".")
    if not _OCTETS.fullmatch(".".join(octets)) or any(int(octet) > 255 for octet in octets):
        raise ValueRefusedError("invalid format")
    address4 = bytes(map(int, octets)).ljust(4, b"\0")
    prefix = _checked(Prefix(int.from_bytes(address4, "big"), bits), 32)
    if bits >= _CLASS_BITS and (not is_of_host(address4) or address4[0] == _LOOPBACK4):
        raise ValueRefusedError("no host has such an address")
    return prefix


def prefix6_of(text: str) -> Prefix:
    """Read an IPv6 prefix, such as `fd00:1::/64`; 64 bits if none are said.

    Raises:
        ValueRefusedError: not a prefix, of more than 64 bits, or with bits beyond the mask.
    """
    from ipaddress import IPv6Address  # noqa: PLC0415 - hardly any file has such a prefix

    address, slash, mask = text.rpartition("/")
    bits = _bits(mask, 0, _PREFIX6_BITS_MAX) if slash else _PREFIX6_BITS_DEFAULT
    try:
        found = IPv6Address(address if slash else text)
    except ValueError:
        raise ValueRefusedError(_NOT_NUMERIC) from None
    if found.scope_id is not None:
        raise ValueRefusedError(_NOT_NUMERIC)
    prefix = _checked(Prefix(int(found), bits), 128)
    if bits >= _CLASS_BITS and not is_of_host(found.packed):
        raise ValueRefusedError("no host has such an address")
    return prefix


def _checked(prefix: Prefix, width: int) -> Prefix:
    if prefix.address & ((1 << (width - prefix.bits)) - 1):
        raise ValueRefusedError("bad mask")
    return prefix


def _bits(text: str, low: int, high: int) -> int:
    """Read a number as strtonum(3) does, with its three error texts."""
    if not _NUMBER.fullmatch(text):
        raise ValueRefusedError("invalid")
    if text.startswith("-") and text.strip("-0"):
        raise ValueRefusedError("too small")
    if _is_more(text.lstrip("+-"), high):
        raise ValueRefusedError("too large")
    number = int(text.lstrip("+-0") or "0")
    if number < low:
        raise ValueRefusedError("too small")
    return number


def _is_more(text: str, high: int) -> bool:
    """Tell whether a number, of however many decimal digits, is above `high`."""
    significant = text.lstrip("0")
    return len(significant) > len(str(high)) or int(significant or "0") > high
