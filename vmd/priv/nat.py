"""The packet filter's rules, as text: NAT, forwarded ports, and locked lladdrs.

All of it is in two tables of our own, which each text replaces as a whole: a table for addresses,
and one for the frames of each locked interface. Rules of others are not looked at.

Source: nft(8); sections 12.6 and 12.7 of OpenBSD's behaviour.
"""

from collections.abc import Iterable
from typing import NamedTuple

from vmd.config.model import ForwardConfig
from vmd.wire.internal import LocalAddresses

_ANY_LOCAL = "fib daddr type local"
"""All addresses of the host."""


class Forward(NamedTuple):
    """A port of the host's addresses that leads to a guest's."""

    config: ForwardConfig
    guest: LocalAddresses


class Rules(NamedTuple):
    """What there are to be rules for."""

    nat4: str = ""
    """A network such as `100.64.0.0/10`, whose addresses the world does not see; or none."""
    nat6: str = ""
    forwards: tuple[Forward, ...] = ()
    locked: tuple[tuple[str, str], ...] = ()
    """Interfaces, and the lladdr of the guest that each is for."""


def clearing(table: str) -> str:
    """Return the commands that remove our tables, whether they are there or not."""
    return "".join(
        f"table {family} {table}\ndelete table {family} {table}\n" for family in ("inet", "netdev")
    )


def ruleset(table: str, rules: Rules) -> str:
    """Return the commands that make our tables, both of the name `table`, what `rules` says."""
    text = clearing(table)
    chains = [*_address_chains(rules)]
    if chains:
        text += f"table inet {table} {{\n{''.join(chains)}}}\n"
    if rules.locked:
        chains = [chain for name, lladdr in rules.locked for chain in _locked(name, lladdr)]
        text += f"table netdev {table} {{\n{''.join(chains)}}}\n"
    return text


def _chain(name: str, hook: str, lines: Iterable[str]) -> str:
    body = "".join(f"\t\t{line}\n" for line in (hook, *lines))
    return f"\tchain {name} {{\n{body}\t}}\n"


def _address_chains(rules: Rules) -> Iterable[str]:
    forwards = [line for forward in rules.forwards for line in _forward(forward)]
    if forwards:
        yield _chain(
            "prerouting", "type nat hook prerouting priority dstnat; policy accept;", forwards
        )
        # What the host itself sends to its own addresses; 127.0.0.1 and ::1 cannot be left.
        exempt = ["ip daddr 127.0.0.0/8 return", "ip6 daddr ::1 return"]
        yield _chain(
            "output", "type nat hook output priority -100; policy accept;", [*exempt, *forwards]
        )
    hidden = [
        f"{family} saddr {network} {family} daddr != {network} masquerade"
        for family, network in (("ip", rules.nat4), ("ip6", rules.nat6))
        if network
    ]
    if hidden:
        yield _chain(
            "postrouting", "type nat hook postrouting priority srcnat; policy accept;", hidden
        )


def _forward(forward: Forward) -> Iterable[str]:
    (protocol, port, to_port, address), guest = forward
    four, six = (
        (f"ip daddr {address}", f"ip6 daddr {address}") if address else (_ANY_LOCAL, _ANY_LOCAL)
    )
    if ":" not in address:
        yield f"{four} {protocol} dport {port} dnat ip to {guest.guest4}:{to_port}"
    if guest.guest6 and "." not in address:
        yield f"{six} {protocol} dport {port} dnat ip6 to [{guest.guest6}]:{to_port}"


def _locked(name: str, lladdr: str) -> Iterable[str]:
    """What the guest sends comes in there, what it receives goes out.

    Bytes of the frame, not nft's own words for them: those look first where a frame came from, and
    one that the host itself sends has come from nowhere. Bit 7 says that it is for several.
    """
    number = f"0x{lladdr.replace(':', '')}"
    yield _chain(
        f"from_{name}",
        f'type filter hook ingress device "{name}" priority 0; policy accept;',
        [f"@ll,48,48 != {number} drop"],
    )
    yield _chain(
        f"to_{name}",
        f'type filter hook egress device "{name}" priority 0; policy accept;',
        [f"@ll,7,1 0 @ll,0,48 != {number} drop"],
    )
