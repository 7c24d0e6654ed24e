"""Interfaces of `vmctl run`, as users type them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmctl.foreground.nic_options import NicKind, NicOption, parse_nic, read_nics
from vmd.config.model import ForwardConfig
from vmm_kvm.errors import SpecError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", NicOption(NicKind.NONE)),
        ("passt", NicOption(NicKind.PASST)),
        ("tap:tap0", NicOption(NicKind.TAP, "tap0")),
        ("stream:/run/x", NicOption(NicKind.STREAM, "/run/x")),
        ("vhost-user:a:b", NicOption(NicKind.VHOST_USER, "a:b")),
        (
            "tap:t,queues=4,mtu=9000,locked,user,lladdr=fe:e1:bb:00:00:01",
            NicOption(NicKind.TAP, "t", bytes.fromhex("fee1bb000001"), True, 9000, 4, True),
        ),
        ("vhost-user:s,queues=3", NicOption(NicKind.VHOST_USER, "s", queues=3)),
        ("bridge:b,queues=2", NicOption(NicKind.BRIDGE, "b", queues=2)),
        ("tap:t,process", NicOption(NicKind.TAP, "t", is_process=True)),
        (
            "passt,forward=tcp:8080:80,forward=udp:*:53",
            NicOption(
                NicKind.PASST,
                forwards=(
                    ForwardConfig("tcp", 8080, 80, "127.0.0.1"),
                    ForwardConfig("udp", 53, 53),
                ),
            ),
        ),
    ],
)
def test_interfaces(text: str, expected: NicOption) -> None:
    """Kinds and options have the meaning of their names."""
    assert parse_nic(text) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "unknown kind ''"),
        ("hub:x", "unknown kind 'hub'"),
        ("tap", "tap has no name"),
        ("passt:x", "passt takes no name"),
        ("tap:t,fast", "unknown option 'fast'"),
        ("tap:t,locked=1", "unknown option 'locked=1'"),
        ("tap:t,queues", "unknown option 'queues'"),
        ("tap:t,queues=17", "invalid queues: 17: not 1 to 16"),
        ("tap:t,mtu=67", "invalid mtu: 67: not 68 to 65521"),
        ("tap:t,mtu=" + "9" * 5000, "9: not 68 to 65521"),
        ("passt,queues=2", "queues is not for passt"),
        ("vhost-user:s,locked", "locked is not for vhost-user"),
        ("tap:t,forward=tcp:1", "forward is not for tap"),
        ("passt,forward=sctp:1", "invalid forward: sctp:1: not tcp|udp:[address:]port[:port]"),
        ("passt,forward=tcp:0", "invalid port: 0: not 1 to 65535"),
        ("passt,forward=tcp:1:2:3", "not tcp|udp:[address:]port[:port]"),
        ("none,lladdr=01:00:5e:00:00:01", "invalid address: 01:00:5e:00:00:01: no station has it"),
        ("none,lladdr=fee1bb000001", "invalid address: fee1bb000001"),
        ("tap:t,user,process", "user and process exclude each other"),
    ],
)
def test_what_is_refused(text: str, problem: str) -> None:
    """The message names the interface and its fault."""
    with pytest.raises(SpecError) as raised:
        parse_nic(text)
    assert str(raised.value).startswith("invalid interface: ")
    assert problem in str(raised.value)


def test_counts() -> None:
    """A count adds unplugged interfaces after the described ones."""
    none, local = NicOption(NicKind.NONE), NicOption(NicKind.PASST)
    assert read_nics([]) == []
    assert read_nics(["2"], local=1) == [local, none]
    assert read_nics(["3"], ["b"], local=1) == [parse_nic("bridge:b"), local, none]
    assert read_nics(["tap:t", "1"]) == [parse_nic("tap:t")]
    with pytest.raises(SpecError, match="invalid count: 17: not 0 to 16"):
        read_nics(["17"])
    with pytest.raises(SpecError, match="17 interfaces: 16 are possible"):
        read_nics(["none"] * 17)


@given(st.text())
def test_nothing_else_is_raised(text: str) -> None:
    """Any text is an interface, or is refused; nothing else is raised."""
    try:
        read_nics([text, f"tap:{text}", f"tap:t,{text}", f"passt,forward={text}"])
    except SpecError:
        return
