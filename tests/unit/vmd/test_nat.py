"""The packet filter's rules: their text, and that nft takes it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from vmd.config.model import ForwardConfig
from vmd.priv.nat import Forward, Rules, clearing, ruleset
from vmd.wire.internal import LocalAddresses


def _guest(ipv4: str, ipv6: str = "") -> LocalAddresses:
    return LocalAddresses(host4="", guest4=ipv4, host_lladdr="", guest6=ipv6)


WEB = Forward(ForwardConfig("tcp", 8080, 80), _guest("100.64.1.3", "fd00::3"))
EVERYTHING = Rules(
    nat4="100.64.0.0/10",
    nat6="fd00::/64",
    forwards=(WEB, Forward(ForwardConfig("udp", 53, 5353), _guest("100.64.1.5"))),
    locked=(("tap0", "fe:e1:bb:d1:00:01"), ("tap10", "fe:e1:bb:d2:00:01")),
)


def test_nothing_makes_no_table() -> None:
    """Without rules, what is left is to remove those that there were."""
    assert ruleset("vmd", Rules()) == clearing("vmd")


@pytest.mark.parametrize(
    ("address", "rules"),
    [
        ("192.0.2.1", ["ip daddr 192.0.2.1 tcp dport 8080 dnat ip to 100.64.1.3:80"]),
        ("2001:db8::1", ["ip6 daddr 2001:db8::1 tcp dport 8080 dnat ip6 to [fd00::3]:80"]),
    ],
)
def test_an_address(address: str, rules: list[str]) -> None:
    """A forward from one address of the host is for its family alone."""
    config = WEB.config._replace(address=address)
    text = ruleset("vmd", Rules(forwards=(WEB._replace(config=config),)))
    assert [line.strip() for line in text.splitlines() if "dnat ip" in line] == rules * 2


def test_everything() -> None:
    """Ports lead to guests from outside and from the host; addresses hide; frames are checked."""
    expected = """\
table inet vmd
delete table inet vmd
table netdev vmd
delete table netdev vmd
table inet vmd {
	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local tcp dport 8080 dnat ip to 100.64.1.3:80
		fib daddr type local tcp dport 8080 dnat ip6 to [fd00::3]:80
		fib daddr type local udp dport 53 dnat ip to 100.64.1.5:5353
	}
	chain output {
		type nat hook output priority -100; policy accept;
		ip daddr 127.0.0.0/8 return
		ip6 daddr ::1 return
		fib daddr type local tcp dport 8080 dnat ip to 100.64.1.3:80
		fib daddr type local tcp dport 8080 dnat ip6 to [fd00::3]:80
		fib daddr type local udp dport 53 dnat ip to 100.64.1.5:5353
	}
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 100.64.0.0/10 ip daddr != 100.64.0.0/10 masquerade
		ip6 saddr fd00::/64 ip6 daddr != fd00::/64 masquerade
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
    assert done.stdout.count("masquerade") == 2
    assert done.stdout.count("drop") == 4
    assert "left:" not in done.stdout
