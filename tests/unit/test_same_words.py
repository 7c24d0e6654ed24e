"""A value that no VM can have is refused by vm.conf and by command lines in the same words."""

from __future__ import annotations

import pytest

from tests.unit.config.fake_host import FakeHost
from vmctl.client import CommandError
from vmctl.daemon.start import StartOptions, _request
from vmctl.foreground.nic_options import parse_nic, read_nics
from vmctl.values import cpus_of, memory_of
from vmd.config.parser import read_config
from vmm_kvm.commands.vmm_net import run as vmm_net
from vmm_kvm.errors import SpecError

NO_STATION = "no station has it"
PORTS = "not 1 to 65535"


def of_file(option: str) -> str:
    """Return what vm.conf says of an option of a VM; empty if it takes it."""
    reading = read_config("f", {}, host=FakeHost({"f": f'vm "a" {{ {option} }}\n'.encode()}))
    return "\n".join(reading.errors)


def of_nic(text: str) -> str:
    """Return what `vmctl run -i` says of an interface; empty if it takes it."""
    try:
        parse_nic(text)
    except SpecError as err:
        return str(err)
    return ""


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("01:00:00:00:00:01", f"invalid address: 01:00:00:00:00:01: {NO_STATION}"),
        ("01:00:5e:00:00:fb", f"invalid address: 01:00:5e:00:00:fb: {NO_STATION}"),
        ("33:33:00:00:00:01", f"invalid address: 33:33:00:00:00:01: {NO_STATION}"),
        ("ff:ff:ff:ff:ff:ff", f"invalid address: ff:ff:ff:ff:ff:ff: {NO_STATION}"),
        ("FF:0:0:0:0:0", f"invalid address: FF:0:0:0:0:0: {NO_STATION}"),
        ("1:2:3", "invalid address: 1:2:3"),
        ("fe:e1:bb:d1:00:01:02", "invalid address: fe:e1:bb:d1:00:01:02"),
        ("fe-e1-bb-d1-00-01", "invalid address: fe-e1-bb-d1-00-01"),
        ("fee1.bbd1.0001", "invalid address: fee1.bbd1.0001"),
        ("fee1bbd10001", "invalid address: fee1bbd10001"),
        ("fe:e1:bb:d1:00:1g", "invalid address: fe:e1:bb:d1:00:1g"),
        ("fe:e1:bb:d1:00:", "invalid address: fe:e1:bb:d1:00:"),
        ("random", "invalid address: random"),
        ("", "invalid address: "),
        ("00:00:00:00:00:00", ""),  # as in OpenBSD: any
        ("0:0:0:0:0:0", ""),
        ("FE:E1:BB:D1:00:01", ""),
        ("2:0:0:0:0:1", ""),
    ],
)
def test_addresses_of_interfaces(
    written: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An lladdr of vm.conf, of `-i` and of vmm-net."""
    assert of_file(f'interface {{ lladdr "{written}" }}').removeprefix("f:1: ") == words
    assert of_file(f'interface {{ locked lladdr "{written}" }}').removeprefix("f:1: ") == words
    assert of_nic(f"none,lladdr={written}").endswith(words)
    assert bool(of_nic(f"none,lladdr={written}")) == bool(words)
    if words:
        with pytest.raises(SystemExit):
            vmm_net(["--socket", "/none/s", "--lladdr", written, "tap0"])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "argument", "words"),
    [
        ("interface { mtu 0 }", "none,mtu=0", "invalid mtu: 0: not 68 to 65521"),
        ("interface { mtu 67 }", "none,mtu=67", "invalid mtu: 67: not 68 to 65521"),
        ("interface { mtu 65522 }", "none,mtu=65522", "invalid mtu: 65522: not 68 to 65521"),
        ("interface { mtu -1 }", "none,mtu=-1", "invalid mtu: -1: not 68 to 65521"),
        ("interface { queues 0 }", "tap:t,queues=0", "invalid queues: 0: not 1 to 16"),
        ("interface { queues 17 }", "tap:t,queues=17", "invalid queues: 17: not 1 to 16"),
        (
            "local interface { forward tcp 0 to 80 }",
            "passt,forward=tcp:0:80",
            f"invalid port: 0: {PORTS}",
        ),
        (
            "local interface { forward tcp 80 to 0 }",
            "passt,forward=tcp:80:0",
            f"invalid port: 0: {PORTS}",
        ),
        (
            "local interface { forward udp 65536 to 80 }",
            "passt,forward=udp:65536:80",
            f"invalid port: 65536: {PORTS}",
        ),
        (
            'local interface { forward tcp "224.0.0.1" 80 to 80 }',
            "passt,forward=tcp:224.0.0.1:80",
            "invalid address to forward from: 224.0.0.1",
        ),
        (
            'local interface { forward tcp "255.255.255.255" 80 to 80 }',
            "passt,forward=tcp:255.255.255.255:80",
            "invalid address to forward from: 255.255.255.255",
        ),
        (
            'local interface { forward tcp "ff02::1" 80 to 80 }',
            "passt,forward=tcp:[ff02::1]:80",
            "invalid address to forward from: ff02::1",
        ),
        (
            "local interface { forward tcp 80 to 80 forward tcp 80 to 81 }",
            "passt,forward=tcp:80,forward=tcp:80:81",
            "forwarded port tcp 80 comes twice",
        ),
        (
            'local interface { forward tcp "*" 80 to 80 forward tcp 80 to 81 }',
            "passt,forward=tcp:*:80,forward=tcp:80:81",
            "forwarded port tcp 80 comes twice",
        ),
        ('interface "tap1234567890123456"', "tap:tap1234567890123456", "tap1234567890123456"),
        ('interface "tap 1"', "tap:tap 1", "invalid interface: tap 1"),
        ('interface "a/b"', "tap:a/b", "invalid interface: a/b"),
        ('interface ".."', "tap:..", "invalid interface: .."),
        ('interface "all"', "tap:all", "invalid interface: all"),
    ],
)
def test_values_of_interfaces(option: str, argument: str, words: str) -> None:
    """An option of an interface, of vm.conf and of `-i`."""
    assert words in of_file(option)
    assert words in of_nic(argument)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 16, "switch interface too long: " + "x" * 16),
        ("ü" * 8, "switch interface too long: " + "ü" * 8),
        ("a b", "invalid switch interface: a b"),
        ("a/b", "invalid switch interface: a/b"),
        ("a:b", "invalid switch interface: a:b"),
        ("..", "invalid switch interface: .."),
        ("default", "invalid switch interface: default"),
        ("", "invalid switch interface: "),
    ],
)
def test_names_of_bridges(name: str, words: str) -> None:
    """The bridge of a switch in vm.conf, of `run -n` and of `run -i`."""
    file = FakeHost({"f": f'switch "s" {{ interface "{name}" }}\n'.encode()})
    assert words in "\n".join(read_config("f", {}, host=file).errors)
    with pytest.raises(SpecError) as raised:
        read_nics([], [name])
    assert str(raised.value) == words
    if name:
        assert words in of_nic(f"bridge:{name}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "memory size must be at least 1MB"),
        ("1K", "memory size must be at least 1MB"),
        ("1023K", "memory size must be at least 1MB"),
        ("512", "memory size must be at least 1MB"),
        ("129G", "memory size too large (limit is 128G)"),
        ("1T", "memory size too large (limit is 128G)"),
        ("9" * 30, "invalid memory size: " + "9" * 30 + ": Result too large"),
        ("512MB", "invalid memory size: 512MB: Invalid argument"),
        ("0x100M", "invalid memory size: 0x100M: Invalid argument"),
        ("much", "invalid memory size: much: Invalid argument"),
    ],
)
def test_sizes_of_memory(text: str, words: str) -> None:
    """The memory of a VM, in vm.conf and by `-m`."""
    assert words in of_file(f'memory "{text}"')
    with pytest.raises(SpecError) as raised:
        memory_of(text)
    assert str(raised.value).splitlines()[0] == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "cpu count is too small: 0"),
        ("-1", "cpu count is too small: -1"),
        ("65", "cpu count is too large: 65"),
        ("99999999999", "cpu count is too large: 99999999999"),
    ],
)
def test_counts_of_processors(text: str, words: str) -> None:
    """The processors of a VM, in vm.conf and by `-c`."""
    assert words in of_file(f"cpus {text}")
    with pytest.raises(SpecError) as raised:
        cpus_of(text)
    assert str(raised.value) == words


@pytest.mark.parametrize("text", ["٣", "1_0", "2.0", "", "2x", "+-2", "0x2", "²", "9" * 5000])
def test_numbers_are_decimal(text: str) -> None:
    """What Python would take for a number besides, or not at all, is none."""
    with pytest.raises(SpecError, match="cpu count is invalid: "):
        cpus_of(text)
    assert of_nic(f"none,mtu={text}") == (
        f"invalid interface: none,mtu={text}: invalid mtu: {text}: not 68 to 65521"
    )
    assert "queues are 1 to 64" in of_disk(text)


def of_disk(queues: str) -> str:
    """Return what `vmctl start -d` says of a disk with so many queues."""
    options = StartOptions(disks=(f"/none.img,queues={queues}",), boot=("/etc/passwd",))
    with pytest.raises(CommandError) as raised:
        _request(options, [])
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [("x" * 64, "too long"), ("ü" * 32, "too long"), ("", "invalid network")],
)
def test_names_of_switches(name: str, words: str) -> None:
    """A name that a switch cannot have is none of `start -n`, nor of vm.conf."""
    with pytest.raises(CommandError, match=words):
        _request(StartOptions(switches=(name,), boot=("/etc/passwd",)), [])
    if name:
        assert "switch name too long" in of_file(f'interface {{ switch "{name}" }}')
        file = FakeHost({"f": f'switch "{name}" {{ interface br0 }}\n'.encode()})
        assert "switch name too long" in "\n".join(read_config("f", {}, host=file).errors)
