"""The packet filter's rules: their text, and that nft takes it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vmd.config.model import ForwardConfig
from vmd.priv.nat import Piece, Place, clearing, forward, install, lock, nat, ruleset
from vmd.wire.internal import LocalAddresses

ROOT = Path(__file__).resolve().parents[3]


def _guest(ipv4: str, ipv6: str = "") -> LocalAddresses:
    return LocalAddresses(host4="", guest4=ipv4, host_lladdr="", guest6=ipv6)


TAP0, TAP10 = Place(1, 0, "tap0"), Place(2, 0, "tap10")
WEB = ForwardConfig("tcp", 8080, 80)
WEB_GUEST = _guest("100.64.1.3", "fd00::3")
EVERYTHING = (
    *nat("100.64.0.0/10", "fd00::/64"),
    *forward(WEB, WEB_GUEST, TAP0),
    *forward(ForwardConfig("udp", 53, 5353, "127.0.0.1"), _guest("100.64.1.5"), TAP10),
    lock("fe:e1:bb:d1:00:01", TAP0),
    lock("fe:e1:bb:d2:00:01", TAP10),
)


def test_nothing_makes_no_table() -> None:
    """Without rules, the text only removes former ones."""
    assert ruleset("vmd", ()) == clearing("vmd")


@pytest.mark.parametrize(
    ("address", "rules"),
    [
        ("192.0.2.1", ["ip daddr 192.0.2.1 tcp dport 8080 dnat ip to 100.64.1.3:80"]),
        ("2001:db8::1", ["ip6 daddr 2001:db8::1 tcp dport 8080 dnat ip6 to [fd00::3]:80"]),
    ],
)
def test_an_address(address: str, rules: list[str]) -> None:
    """A forward from one address of the host is for its family alone."""
    text = ruleset("vmd", forward(WEB._replace(address=address), WEB_GUEST, TAP0))
    assert [line.strip() for line in text.splitlines() if "dnat ip" in line] == rules * 2


def test_everything() -> None:
    """Ports lead to guests from outside and from the host; addresses hide; frames are checked."""
    expected = """\
table inet vmd
delete table inet vmd
table netdev vmd
delete table netdev vmd
table inet vmd {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 100.64.0.0/10 ip daddr != 100.64.0.0/10 masquerade
		ip6 saddr fd00::/64 ip6 daddr != fd00::/64 masquerade
		oifname "tap0" ip saddr 127.0.0.0/8 masquerade
		oifname "tap10" ip saddr 127.0.0.0/8 masquerade
	}
	chain between {
		type filter hook forward priority filter; policy accept;
		ip saddr 100.64.0.0/10 ip daddr 100.64.0.0/10 ct status dnat accept
		ip saddr 100.64.0.0/10 ip daddr 100.64.0.0/10 drop
		ip6 saddr fd00::/64 ip6 daddr fd00::/64 ct status dnat accept
		ip6 saddr fd00::/64 ip6 daddr fd00::/64 drop
	}
	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local tcp dport 8080 dnat ip to 100.64.1.3:80
		fib daddr type local tcp dport 8080 dnat ip6 to [fd00::3]:80
	}
	chain output {
		type nat hook output priority -100; policy accept;
		ip daddr != 127.0.0.0/8 fib daddr type local tcp dport 8080 dnat ip to 100.64.1.3:80
		ip6 daddr != ::1 fib daddr type local tcp dport 8080 dnat ip6 to [fd00::3]:80
		ip daddr 127.0.0.1 tcp dport 8080 dnat ip to 100.64.1.3:80
		ip daddr 127.0.0.1 udp dport 53 dnat ip to 100.64.1.5:5353
	}
	chain guard {
		type filter hook prerouting priority raw; policy accept;
		iifname "tap0" ip daddr 127.0.0.0/8 drop
		iifname "tap10" ip daddr 127.0.0.0/8 drop
	}
}
table netdev vmd {
	chain from_tap0 {
		type filter hook ingress device "tap0" priority 0; policy accept;
		@ll,48,48 != 0xfee1bbd10001 drop
	}
	chain to_tap0 {
		type filter hook egress device "tap0" priority 0; policy accept;
		@ll,7,1 0 @ll,0,48 != 0xfee1bbd10001 drop
	}
	chain from_tap10 {
		type filter hook ingress device "tap10" priority 0; policy accept;
		@ll,48,48 != 0xfee1bbd20001 drop
	}
	chain to_tap10 {
		type filter hook egress device "tap10" priority 0; policy accept;
		@ll,7,1 0 @ll,0,48 != 0xfee1bbd20001 drop
	}
}
"""
    assert ruleset("vmd", EVERYTHING) == expected


@pytest.mark.root
@pytest.mark.skipif(shutil.which("nft") is None, reason="nft is not installed")
def test_nft_takes_it() -> None:
    """In a namespace of its own, the text takes effect, twice, and is removed without a trace."""
    script = """
        ip tuntap add tap0 mode tap && ip tuntap add tap10 mode tap
        nft list ruleset > /dev/null && nft -f - <<END && nft -f - <<END && nft list ruleset
{rules}END
{rules}END
        nft -f - <<END && nft list ruleset | sed 's/^/left: /'
{clearing}END
    """.format(rules=ruleset("vmd", EVERYTHING), clearing=clearing("vmd"))
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("masquerade") == 4
    assert done.stdout.count("drop") == 8
    assert "left:" not in done.stdout


def test_a_forward_from_an_address_that_the_guest_lacks() -> None:
    """A forward from an IPv6 address does not exist for a guest without IPv6."""
    config = WEB._replace(address="2001:db8::1")
    assert list(forward(config, _guest("100.64.1.3"), TAP0)) == []


def _numbered(*numbers: int) -> tuple[Piece, ...]:
    return tuple(Piece(str(number), "", ()) for number in numbers)


@pytest.mark.parametrize("bad", [(), (0,), (5,), (19,), (3, 4), tuple(range(20))])
def test_what_is_refused_takes_nothing_with_it(bad: tuple[int, ...]) -> None:
    """If a rule is refused all others are applied, in few tries."""
    refused_ones = _numbered(*bad)
    tries: list[tuple[Piece, ...]] = []
    there: tuple[Piece, ...] = _numbered(99)

    def apply(pieces: Sequence[Piece]) -> str:
        nonlocal there
        tries.append(tuple(pieces))
        if any(piece in refused_ones for piece in pieces):
            return "refused"
        there = tuple(pieces)
        return ""

    pieces = _numbered(*range(20))
    accepted, refused = install(pieces, apply)
    assert tuple(accepted) == there == tuple(piece for piece in pieces if piece not in refused_ones)
    assert refused == dict.fromkeys(refused_ones, "refused")
    assert len(tries) <= 1 + 10 * len(bad)


# Makes rules of which the kernel refuses one: it has no NAT at so early a priority.
_REFUSED = """
import sys
from vmd.priv.nat import Chain, Piece, install, nat, ruleset
from vmd.priv.nftables import Nftables, NftablesError

nftables = Nftables()

def apply(pieces):
    try:
        nftables.run(ruleset("vmd", pieces))
    except NftablesError as err:
        return str(err)
    return ""

early = Chain("inet", "early", "type nat hook prerouting priority -300; policy accept;")
bad = Piece("early", "", ((early, "ip daddr 192.0.2.1 drop"),))
pieces = [*nat("100.64.0.0/10", ""), bad, *nat("10.0.0.0/8", "fd00::/64")]
accepted, refused = install(pieces, apply)
print([piece.what for piece in accepted], [piece.what for piece in refused])
print(*refused.values())
"""


@pytest.mark.root
@pytest.mark.skipif(shutil.which("nft") is None, reason="nft is not installed")
def test_what_the_kernel_refuses() -> None:
    """If the kernel refuses a rule, the others are applied, and the rule is named."""
    script = f"{shlex.quote(sys.executable)} - <<'END' && nft list ruleset\n{_REFUSED}\nEND\n"
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    networks = ("100.64.0.0/10", "10.0.0.0/8", "fd00::/64")
    whats = [f"{what} of {each}" for each in networks for what in ("nat", "separation of guests")]
    expected = f"{whats} ['early']"
    first, second, *rest = done.stdout.splitlines()
    assert first == expected
    # Messages of older releases of nftables, and of newer ones.
    assert "Could not process rule" in second or "must have a priority" in second
    assert "\n".join(rest).count("masquerade") == 3
