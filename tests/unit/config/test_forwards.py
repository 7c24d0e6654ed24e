"""Forwarded ports, as users type them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.config.forwards import ForwardError, check_ports, host_address, parse_forward
from vmd.config.model import ForwardConfig


@pytest.mark.parametrize(
    ("text", "expected", "passt"),
    [
        ("tcp:8022:22", ForwardConfig("tcp", 8022, 22, "127.0.0.1"), "127.0.0.1/8022:22"),
        ("tcp:127.0.0.1:8022:22", ForwardConfig("tcp", 8022, 22, "127.0.0.1"), "127.0.0.1/8022:22"),
        ("udp:53", ForwardConfig("udp", 53, 53, "127.0.0.1"), "127.0.0.1/53:53"),
        ("tcp:*:80:8080", ForwardConfig("tcp", 80, 8080), "80:8080"),
        ("tcp:0.0.0.0:80", ForwardConfig("tcp", 80, 80), "80:80"),
        ("tcp:[::]:80", ForwardConfig("tcp", 80, 80), "80:80"),
        ("tcp:[::1]:80:81", ForwardConfig("tcp", 80, 81, "::1"), "::1/80:81"),
    ],
)
def test_forwards(text: str, expected: ForwardConfig, passt: str) -> None:
    """Only the host itself may connect, unless an address is given or a star for all."""
    assert parse_forward(text) == expected
    assert expected.passt_ports == passt


@pytest.mark.parametrize(
    "text",
    [
        *("", "tcp", "tcp:", "80", "sctp:80", "tcp:x", "tcp:80:", "tcp::80", "tcp:1:2:3", "tcp:-1"),
        *("tcp:1.2.3:80", "tcp:1.2.3.4", "tcp:1.2.3.4.5:80", "tcp:1.2.3.4:", "tcp:[::1:80"),
        *("tcp:::1:80", "tcp:[1.2.3.4]:80", "tcp:[::1]80", "tcp:*", "tcp:80:81:*", "tcp:\u0662"),
        *("tcp:0", "tcp:65536", "tcp:80:65536", "tcp:999999999999", "tcp:1.2.3.4\0:80", "TCP:80"),
    ],
)
def test_what_is_no_forward(text: str) -> None:
    """A wrong forward is refused in one line that quotes it."""
    with pytest.raises(ForwardError, match=r"^invalid forward: ") as caught:
        parse_forward(text)
    assert text in str(caught.value)


@given(st.text(alphabet="tcpud:.*[]0189af", max_size=30) | st.text())
def test_nothing_else_is_raised(text: str) -> None:
    """Any text is a forward, or refused; nothing else is raised."""
    try:
        forward = parse_forward(text)
    except ForwardError:
        return
    assert 1 <= forward.port <= 65535
    if forward.address:
        assert host_address(forward.address) == forward.address


@pytest.mark.parametrize("text", ["", "localhost", "1.2.3", "1.2.3.4/8", "::g", "1.2.3.4\0"])
def test_what_is_no_address(text: str) -> None:
    """A request cannot bring anything but an address into a rule."""
    with pytest.raises(ForwardError, match="invalid address"):
        host_address(text)


@pytest.mark.parametrize(
    ("one", "other", "is_refused"),
    [
        ("tcp:80", "tcp:80:81", True),
        ("tcp:80", "tcp:*:80:81", True),
        ("tcp:0.0.0.0:80", "tcp:192.0.2.1:80", True),
        ("tcp:80", "udp:80", False),
        ("tcp:80", "tcp:81:80", False),
        ("tcp:192.0.2.1:80", "tcp:192.0.2.2:80", False),
    ],
)
def test_the_same_port_twice(one: str, other: str, is_refused: bool) -> None:
    """An address and all addresses are the same port as well."""
    forwards = [parse_forward(one), parse_forward(other)]
    if is_refused:
        with pytest.raises(ForwardError, match="port tcp 80 comes twice"):
            check_ports(forwards)
    else:
        check_ports(forwards)
