"""The packet filter's rules, as text: NAT, forwarded ports, and locked lladdrs.

All of it is in two tables of our own, which each text replaces as a whole: a table for addresses,
and one for the frames of each locked interface. It leaves other rules alone. Rules that depend on
each other form a piece: the kernel may lack a feature that one piece needs, while the others work.

Source: nft(8); sections 12.6 and 12.7 of OpenBSD's behaviour.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from vmd.config.model import ForwardConfig
from vmd.wire.internal import LocalAddresses

_ANY_LOCAL = "fib daddr type local"
_LOOPBACK = "127.0.0.0/8"

_NEEDS_NAT = "the kernel's nft_chain_nat and nft_masq"
_NEEDS_BETWEEN = "the kernel's nft_ct"
_NEEDS_FORWARD = "the kernel's nft_fib_inet, nft_chain_nat and nft_nat"
_NEEDS_LOCK = "Linux 5.16 or later, with nftables for network devices"


class Chain(NamedTuple):
    """A chain of one of our tables."""

    family: str
    name: str
    hook: str


_PREROUTING = Chain(
    "inet", "prerouting", "type nat hook prerouting priority dstnat; policy accept;"
)
_OUTPUT = Chain("inet", "output", "type nat hook output priority -100; policy accept;")
_POSTROUTING = Chain(
    "inet", "postrouting", "type nat hook postrouting priority srcnat; policy accept;"
)
_BETWEEN = Chain("inet", "between", "type filter hook forward priority filter; policy accept;")
_GUARD = Chain("inet", "guard", "type filter hook prerouting priority raw; policy accept;")


class Place(NamedTuple):
    """An interface of a VM."""

    vm_id: int
    position: int
    """Among the VM's, from 0."""
    tap: str


class Piece(NamedTuple):
    """Rules that work together, or not at all."""

    what: str
    """As an operator knows it."""
    needs: str
    """The kernel's features that it needs."""
    rules: tuple[tuple[Chain, str], ...]
    place: Place | None = None
    """The VM of the rules; None for common ones."""
    is_lock: bool = False
    opens_loopback: bool = False
    """The guest's interface has to accept packets of the loopback network; the guard keeps the
    guest itself from sending any."""


def nat(network4: str, network6: str) -> Iterator[Piece]:
    """Yield rules that hide the addresses of guests, of networks that may be empty.

    NAT needs a host that forwards, which would forward between guests too: the rules let through
    what goes to a forwarded port.
    """
    for family, network in (("ip", network4), ("ip6", network6)):
        if network:
            rule = f"{family} saddr {network} {family} daddr != {network} masquerade"
            yield Piece(f"nat of {network}", _NEEDS_NAT, ((_POSTROUTING, rule),))
            between = f"{family} saddr {network} {family} daddr {network}"
            rules = ((_BETWEEN, f"{between} ct status dnat accept"), (_BETWEEN, f"{between} drop"))
            yield Piece(f"separation of guests of {network}", _NEEDS_BETWEEN, rules)


def forward(config: ForwardConfig, guest: LocalAddresses, place: Place) -> Iterator[Piece]:
    """Yield rules that forward a port of the host's addresses to a guest's."""
    protocol, port, to_port, address = config
    what = f"forward {protocol} {f'{address} ' if address else ''}{port} to {to_port}"
    to4 = f"{protocol} dport {port} dnat ip to {guest.guest4}:{to_port}"
    to6 = f"{protocol} dport {port} dnat ip6 to [{guest.guest6}]:{to_port}"
    rules: list[tuple[Chain, str]] = []
    if not address:
        rules = [
            (_PREROUTING, f"{_ANY_LOCAL} {to4}"),
            (_OUTPUT, f"ip daddr != {_LOOPBACK} {_ANY_LOCAL} {to4}"),
        ]
        if guest.guest6:  # ::1 cannot be left
            rules += [
                (_PREROUTING, f"{_ANY_LOCAL} {to6}"),
                (_OUTPUT, f"ip6 daddr != ::1 {_ANY_LOCAL} {to6}"),
            ]
    elif ":" in address and guest.guest6:
        rules = [(chain, f"ip6 daddr {address} {to6}") for chain in (_PREROUTING, _OUTPUT)]
    elif ":" not in address and not is_loopback(address):
        rules = [(chain, f"ip daddr {address} {to4}") for chain in (_PREROUTING, _OUTPUT)]
    if rules:
        yield Piece(what, _NEEDS_FORWARD, tuple(rules), place)
    if not address or is_loopback(address):
        yield Piece(
            what if address else f"{what} for 127.0.0.1",
            _NEEDS_FORWARD,
            (
                (_GUARD, f'iifname "{place.tap}" ip daddr {_LOOPBACK} drop'),
                (_OUTPUT, f"ip daddr {address or '127.0.0.1'} {to4}"),
                (_POSTROUTING, f'oifname "{place.tap}" ip saddr {_LOOPBACK} masquerade'),
            ),
            place,
            opens_loopback=True,
        )


def is_loopback(address: str) -> bool:
    """Tell whether an IPv4 address is the host's own."""
    return address.startswith("127.")


def lock(lladdr: str, place: Place) -> Piece:
    """Return rules that drop frames from another address, and to one.

    The guest's frames come in there, and those to it go out. The rules match bytes of the frame
    instead of nft's own words, which first check the input interface: a frame of the host itself
    has none. Bit 7 marks multicast.
    """
    number, tap = f"0x{lladdr.replace(':', '')}", place.tap

    def chain(direction: str, hook: str) -> Chain:
        text = f'type filter hook {hook} device "{tap}" priority 0; policy accept;'
        return Chain("netdev", f"{direction}_{tap}", text)

    rules = (
        (chain("from", "ingress"), f"@ll,48,48 != {number} drop"),
        (chain("to", "egress"), f"@ll,7,1 0 @ll,0,48 != {number} drop"),
    )
    return Piece("locked lladdr", _NEEDS_LOCK, rules, place, is_lock=True)


# Texts


def clearing(table: str) -> str:
    """Return the commands that remove our tables, even if they do not exist."""
    return "".join(
        f"table {family} {table}\ndelete table {family} {table}\n" for family in ("inet", "netdev")
    )


def ruleset(table: str, pieces: Iterable[Piece]) -> str:
    """Return the commands that fill our tables, both of the name `table`, with `pieces`."""
    chains: dict[Chain, dict[str, None]] = {}
    for piece in pieces:
        for chain, rule in piece.rules:
            chains.setdefault(chain, {})[rule] = None
    text = clearing(table)
    for family in ("inet", "netdev"):
        body = "".join(
            _chain_text(chain, rules) for chain, rules in chains.items() if chain.family == family
        )
        if body:
            text += f"table {family} {table} {{\n{body}}}\n"
    return text


def _chain_text(chain: Chain, rules: Iterable[str]) -> str:
    body = "".join(f"\t\t{line}\n" for line in (chain.hook, *rules))
    return f"\tchain {chain.name} {{\n{body}\t}}\n"


def install(
    pieces: Sequence[Piece], apply: Callable[[Sequence[Piece]], str]
) -> tuple[list[Piece], dict[Piece, str]]:
    """Apply as many pieces as possible; returns those, and why the others are refused.

    `apply` sets the rules to some pieces, or leaves them and returns the reason. A refused list is
    tried in halves, so that the number of tries grows with the number of refused pieces.
    """
    accepted: list[Piece] = []
    refused: dict[Piece, str] = {}

    def add(some: Sequence[Piece]) -> None:
        why = apply([*accepted, *some])
        if not why:
            accepted.extend(some)
        elif len(some) > 1:
            half = len(some) // 2
            add(some[:half])
            add(some[half:])
        else:
            refused.update(dict.fromkeys(some, why))

    add(pieces)
    if pieces and not accepted:  # the former rules are not wanted any more
        apply([])
    return accepted, refused
