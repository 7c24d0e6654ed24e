"""Addresses of local interfaces, for host and guest, computed from numbers alone.

An interface's network is found from its VM's id and its own position among all of the VM's, so that
it is the same after every start: an IPv4 network of two addresses, and within the IPv6 prefix one
of 96 bits and the address that the guest makes of its lladdr by itself.

Source: section 12.4 of OpenBSD's behaviour; RFC 4291, appendix A.
"""

from collections.abc import Container
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address

from vmd.config.model import Prefix
from vmd.wire.internal import LocalAddresses
from vmm_kvm.net.ethernet import parse_lladdr

DEFAULT_PREFIX = Prefix(int(IPv4Address("100.64.0.0")), 10)
INDEX_MAX = 126
"""The highest position of an interface among its VM's."""
BITS4 = 31
"""Of an interface's IPv4 network."""
BITS6 = 96
_VM_SHIFT = 8
_ALL_ONES = (1 << 32) - 1
_SUBNET_BITS = 64
_UNIQUE_LOCAL = 0xFD << 120
_RANDOM_BYTES = 7
_ATTEMPTS = 1000


class RangeError(ValueError):
    """The prefix has no address for an interface; `str()` is OpenBSD's line."""


def random_prefix6(entropy: bytes) -> Prefix:
    """Return a unique local prefix made of 7 random bytes.

    Source: section 12.4 of OpenBSD's behaviour; RFC 4193 §3.2.
    """
    assert len(entropy) == _RANDOM_BYTES
    return Prefix(_UNIQUE_LOCAL | int.from_bytes(entropy, "big") << 64, _SUBNET_BITS)


def local_addresses(
    prefix4: Prefix, prefix6: Prefix | None, vm_id: int, index: int, lladdr: str
) -> LocalAddresses:
    """Return the addresses of interface `index`, from 0, of a VM; `lladdr` as `fe:e1:bb:d1:23:45`.

    Raises:
        RangeError: the id or the index does not fit into the prefix.
    """
    offset = vm_id << _VM_SHIFT | (index + 1) * 2
    mask = _ALL_ONES ^ (_ALL_ONES >> prefix4.bits)
    host4 = prefix4.address | offset
    if not 0 <= index <= INDEX_MAX or offset & mask or host4 > _ALL_ONES:
        raise RangeError(f"dhcp address range exceeded, vm id {vm_id} interface {index}")
    host6 = guest6 = ""
    if prefix6 is not None:
        subnet = prefix6.address >> _SUBNET_BITS << _SUBNET_BITS
        host6 = str(IPv6Address(subnet | (host4 + 1) << 32 | 1))
        guest6 = str(IPv6Address(subnet | _interface_id(lladdr)))
    return LocalAddresses(
        host4=str(IPv4Address(host4)),
        guest4=str(IPv4Address(host4 + 1)),
        host_lladdr=host_lladdr(lladdr),
        host6=host6,
        guest6=guest6,
    )


def made_lladdr(host: bytes, uid: int, name: str, index: int, taken: Container[str | None]) -> str:
    """Return the guest's address on interface `index`, from 0, of a VM that names none.

    It is derived from the VM's name and owner, so that it is the same at each start, and from
    `host`, which differs between hosts, so that it is unique on the network. One that is `taken` by
    another VM here is passed over.

    Source: section 7.3 of OpenBSD's behaviour, for its form; there it is random.
    """
    found = ""
    for attempt in range(_ATTEMPTS):
        text = f"{uid}/{name}/{index}/{attempt}"
        digest = sha256(host + b"/" + text.encode(errors="surrogateescape")).digest()
        found = f"fe:e1:bb:d{index + 1:x}:{digest[0]:02x}:{digest[1]:02x}"
        if found not in taken:
            break
    return found


def _interface_id(lladdr: str) -> int:
    """Return the modified EUI-64 of an Ethernet address."""
    octets = parse_lladdr(lladdr)
    return int.from_bytes(bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:], "big")


def subnet6(prefix6: Prefix) -> str:
    """Return the network of 64 bits that guests make their addresses in, such as `fd12::/64`."""
    return f"{IPv6Address(prefix6.address >> _SUBNET_BITS << _SUBNET_BITS)}/{_SUBNET_BITS}"


def subnet4(prefix4: Prefix) -> str:
    """Return the IPv4 network of all local interfaces, such as `100.64.0.0/10`."""
    return f"{IPv4Address(prefix4.address)}/{prefix4.bits}"


def host_lladdr(lladdr: str) -> str:
    """Return the Ethernet address of the host's side of an interface: the guest's, plus one.

    Source: section 12.5 of OpenBSD's behaviour.
    """
    head, _, last = lladdr.rpartition(":")
    return f"{head}:{(int(last, 16) + 1) & 0xFF:02x}"


def is_host_name(text: str) -> bool:
    """Tell whether a VM's name can be its guest's host name: labels of RFC 952, two characters."""
    labels = text.split(".")
    return 1 < len(text) <= 255 and all(
        0 < len(label) <= 63
        and label.isascii()
        and label.replace("-", "a").isalnum()
        and not label.startswith("-")
        and not label.endswith("-")
        for label in labels
    )
