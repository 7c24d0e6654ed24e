"""Warnings about a vm.conf that has no error."""

from __future__ import annotations

import pytest

from tests.unit.config.fake_host import FakeHost
from vmd.config.advice import advice
from vmd.config.parser import parse_config

GIB = 1 << 30


def odd(text: str, *, is_user: bool = False, memory_size: int = 64 * GIB) -> list[str]:
    """Return the warnings about a file called `f`."""
    config = parse_config("f", {}, host=FakeHost({"f": text.encode()}))
    return list(advice(config, is_user=is_user, memory_size=memory_size))


def test_an_unknown_vm_to_start_after() -> None:
    """A missing VM to start after is reported, as it may be mistyped; a later one is known."""
    text = 'vm "a" { disable\nafter "db"\nafter "dbb"\n}\nvm "db" { disk "disk0.img" }\n'
    assert odd(text) == [
        'f:4: warning: vm "a": after "dbb", which is not defined: it waits for nothing'
    ]


TWO = 'vm "a" {{ {0} }}\nvm "b" {{ {1} }}\n'


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ('disk "disk0.img"', "disk /vm/disk0.img"),
        ('disk "/vm/disk0.img" format qcow2', "disk /vm/disk0.img"),
        ("interface tap3", "interface tap3"),
        ("interface { lladdr fe:e1:bb:d1:00:01 }", "lladdr fe:e1:bb:d1:00:01"),
        ("local interface { forward tcp 8080 to 80 }", "forwarded port tcp 8080"),
    ],
)
def test_what_two_vms_cannot_have(option: str, what: str) -> None:
    """If two enabled VMs name the same thing, the second is reported, with the first."""
    text = TWO.format(option, option)
    assert odd(text) == [f'f:2: warning: vm "b": {what} is also used by vm "a"']


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('disk "disk0.img" { ro }', 'disk "disk0.img" { ro }'),
        ('disk "disk0.img"', 'disk "disk1.img"'),
        ('disable\ndisk "disk0.img"', 'disk "disk0.img"'),
        ("local interface { forward tcp 80 to 80 }", "local interface { forward udp 80 to 80 }"),
        ("interface tap1", "interface tap2"),
    ],
)
def test_what_two_vms_can_have(one: str, other: str) -> None:
    """Read-only disks, other things, and those of disabled VMs cause no warning."""
    assert odd(f'vm "a" {{\n{one}\n}}\nvm "b" {{\n{other}\n}}\n') == []


def test_the_same_name_twice() -> None:
    """The first name counts, which is reported; the second VM claims nothing."""
    text = TWO.format('disk "disk0.img"', 'disk "disk0.img"').replace('"b"', '"a"')
    assert odd(text) == ['f:2: warning: vm "a": only the first of this name counts, f:1']


def test_switches() -> None:
    """An undefined switch is named; without privileges switches do not exist."""
    defined = 'switch "up" { interface bridge0 }\n'
    text = 'vm "a" {\n interface { switch "up" }\n interface { switch "up" }\n}\n'
    assert odd(defined + text) == []
    assert odd(text) == ['f:4: warning: vm "a": switch "up" is not defined']
    assert odd(defined + text, is_user=True) == [
        'f:5: warning: vm "a": switch "up": vmd --user has local interfaces only'
    ]


def test_more_memory_than_there_is() -> None:
    """More memory than the host has is reported: it might be swapped."""
    text = 'vm "a" { memory 4G }\n'
    assert odd(text, memory_size=4 * GIB) == []
    assert odd(text, memory_size=2 * GIB) == [
        'f:1: warning: vm "a": 4096 MB of memory, but this host has 2048 MB'
    ]


@pytest.mark.parametrize(("one", "other"), [("", "{ ro }"), ("", "{ snapshot }"), ("{ ro }", "")])
def test_a_disk_that_one_reads_and_another_writes(one: str, other: str) -> None:
    """They cannot run at once, whichever comes first."""
    (line,) = odd(TWO.format(f'disk "disk0.img" {one}', f'disk "disk0.img" {other}'))
    told = "also used by" if one else "written by"
    assert line == f'f:2: warning: vm "b": disk /vm/disk0.img is {told} vm "a"'


def test_a_disk_twice_in_one_vm() -> None:
    """A disk twice in one VM is reported, as its second lock would fail; read-only is fine."""
    text = 'vm "a" {{\ndisk "disk0.img" {0}\ndisk "/vm/disk0.img" {1}\n}}\n'
    assert odd(text.format("", "")) == ['f:4: warning: vm "a": disk /vm/disk0.img comes twice']
    assert odd(text.format("{ ro }", "{ ro }")) == []


def test_a_number_for_a_name() -> None:
    """Verbs would look for an id."""
    (line,) = odd('vm "15" { memory 1G }\n')
    assert line == 'f:1: warning: vm "15": vmctl takes a number for an id'
    assert odd('vm "15a" { memory 1G }\n') == []


def test_two_switches_of_one_name() -> None:
    """The second is never used."""
    text = 'switch "up" { interface bridge0 }\nswitch "up" { interface bridge1 }\n'
    assert odd(text) == ['warning: switch "up": only the first of this name counts']


def test_a_forwarded_port_twice() -> None:
    """Only one of the two can lead somewhere, whichever interface it is for."""

    def vm(first: str, second: str) -> str:
        ports = (f"local interface {{ forward {port} to 80 }}" for port in (first, second))
        return "\n".join(('vm "a" {', *ports, "}\n"))

    found = ['f:4: warning: vm "a": forwarded port tcp 80 comes twice']
    assert odd(vm("tcp 80", "tcp 80")) == found
    assert odd(vm("tcp 80", "udp 80")) == odd(vm("tcp 80", "tcp 81")) == []
