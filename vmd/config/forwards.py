"""Forwarded ports as a user writes them on a command line; and their addresses, also in vm.conf.

    protocol:[address:]port[:port]

The first port is one of the host's, the second one of the guest's, by default the same. The address
is one of the host's, an IPv6 address in brackets; `*`, 0.0.0.0 and :: are all of them. Without an
address only the host itself can connect, through 127.0.0.1: access from elsewhere must be asked
for.
"""

from collections.abc import Sequence

from vmd.config.model import ForwardConfig
from vmm_kvm.limits import PORT_MAX
from vmm_kvm.net.inet import is_of_host

PROTOCOLS = ("tcp", "udp")
LOOPBACK = "127.0.0.1"
ANY = "*"
_UNSPECIFIED = {ANY, "0.0.0.0", "::"}  # noqa: S104 - requested by a user


class ForwardError(ValueError):
    """A forward that cannot be understood; the message is one line."""


def parse_forward(text: str) -> ForwardConfig:
    """Read a forward.

    Raises:
        ForwardError: it is none.
    """
    protocol, _, rest = text.partition(":")
    if protocol not in PROTOCOLS:
        raise _invalid(text)
    address, ports = _address(rest, text)
    host, colon, guest = ports.partition(":")
    port = _port(host, text)
    return ForwardConfig(protocol, port, _port(guest, text) if colon else port, address)


def check_ports(forwards: Sequence[ForwardConfig]) -> None:
    """Refuse two forwards from the same port.

    Raises:
        ForwardError: which.
    """
    for index, one in enumerate(forwards):
        for other in forwards[:index]:
            addresses = {one.address, other.address}
            is_same = (one.protocol, one.port) == (other.protocol, other.port)
            if is_same and (len(addresses) == 1 or "" in addresses):
                raise ForwardError(f"forwarded port {one.protocol} {one.port} comes twice")


def host_address(text: str) -> str:
    """Return the address, of either family, that a text names; empty for all.

    Raises:
        ForwardError: it is none.
    """
    if text in _UNSPECIFIED:
        return ""
    address = _packed(text, is_six=False) or _packed(text, is_six=True)
    if not address or not is_of_host(address):
        raise ForwardError(f"invalid address to forward from: {text}")
    return text


def _address(rest: str, text: str) -> tuple[str, str]:
    """Return the address, empty for all, and what follows."""
    if rest.startswith("["):
        address, bracket, ports = rest[1:].partition("]:")
        if not bracket or not _packed(address, is_six=True):
            raise _invalid(text)
        return host_address(address), ports
    word, colon, ports = rest.partition(":")
    if colon and (word == ANY or "." in word):
        if word != ANY and not _packed(word, is_six=False):
            raise _invalid(text)
        return host_address(word), ports
    return LOOPBACK, rest


def _packed(text: str, *, is_six: bool) -> bytes | None:
    """Return the bytes of an address of one family; None if it is none."""
    import socket  # noqa: PLC0415 - few files have an address

    try:
        return socket.inet_pton(socket.AF_INET6 if is_six else socket.AF_INET, text)
    except (OSError, ValueError):
        return None


def _port(text: str, whole: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > len(str(PORT_MAX)):
        raise _invalid(whole)
    if not 1 <= int(text) <= PORT_MAX:
        raise ForwardError(f"invalid forward: {whole}: invalid port: {text}: not 1 to {PORT_MAX}")
    return int(text)


def _invalid(text: str) -> ForwardError:
    return ForwardError(f"invalid forward: {text}: not tcp|udp:[address:]port[:port]")
