"""A configuration written as text reads again as the same one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.config.fake_host import IMAGES, FakeHost
from vmd.config.disks import DiskKind, DiskOption, OnError
from vmd.config.model import (
    Agentx,
    Config,
    ForwardConfig,
    InterfaceConfig,
    Owner,
    Prefix,
    Right,
    Staggered,
    SwitchConfig,
    VmConfig,
)
from vmd.config.parser import parse_config
from vmd.config.text import config_lines, quoted
from vmm_kvm.boot_device import BootDevice

NO_HOST4 = {127, *range(224, 240)}
"""First bytes of IPv4 addresses that no host has on a network."""


def read_again(config: Config) -> Config:
    """Write a configuration and read it again, without the places of VMs."""
    text = "\n".join(config_lines(config)).encode("utf-8", "surrogateescape")
    again = parse_config("f", {}, host=FakeHost({"f": text}))
    return again._replace(vms=tuple(vm._replace(where="") for vm in again.vms))


# All that quotes may contain: bytes of text or not, without NUL and line breaks.
TEXTS = st.binary(max_size=40).map(
    lambda data: data.translate(None, b"\0\n").decode("utf-8", "surrogateescape")
) | st.text(st.sampled_from("ab\\\"' \t#$={"), max_size=12)
NAMES = TEXTS.filter(lambda text: len(text.encode("utf-8", "surrogateescape")) <= 63)
GROUPS = st.none() | st.sampled_from(["a", "lan", "a b", '"'])
IDS = st.none() | st.integers(0, 2**32 - 2)
OWNERS = st.builds(Owner, IDS, IDS)
PATHS = st.sampled_from(sorted(f"/vm/{name}" for name in IMAGES))
ADDRESSES = (
    st.binary(min_size=6, max_size=6)
    .map(lambda data: bytes([data[0] & ~1]) + data[1:])  # not that of a group
    .filter(any)
    .map(lambda data: data.hex(":"))
)
RDOMAINS = st.none() | st.integers(0, 255)

SWITCHES = st.builds(
    SwitchConfig,
    name=TEXTS,
    interface=st.sampled_from(["br0", "bridge12345678", "virbr0.1", "-"]),
    is_enabled=st.booleans(),
    group=GROUPS,
    is_locked=st.booleans(),
    rdomain=RDOMAINS,
    is_up=st.booleans(),
    is_created=st.just(False),
    address=st.none(),
) | st.builds(
    SwitchConfig,
    name=TEXTS,
    interface=st.just("br0"),
    group=st.none(),
    rdomain=st.none(),
    is_created=st.just(True),
    address=st.sampled_from([None, "10.0.0.1/24", "fd00::1/64"]),
)
PORTS = st.integers(1, 65535)
FORWARDS = st.lists(
    st.builds(
        ForwardConfig,
        st.sampled_from(["tcp", "udp"]),
        PORTS,
        PORTS,
        st.sampled_from(["", "127.0.0.1", "192.0.2.1", "::1"]),
    ),
    max_size=3,
    unique_by=lambda forward: forward[:2],
).map(tuple)
INTERFACES = st.builds(
    InterfaceConfig,
    is_local=st.just(True),
    tap=st.none(),
    switch=st.none() | NAMES.filter(bool),
    group=GROUPS,
    lladdr=st.none() | ADDRESSES,
    rdomain=RDOMAINS,
    mtu=st.none() | st.integers(68, 65521),
    queues=st.none() | st.integers(1, 16),
    forwards=FORWARDS,
) | st.builds(
    InterfaceConfig,
    is_local=st.booleans(),
    mtu=st.none() | st.integers(68, 65521),
    queues=st.none() | st.integers(1, 16),
    forwards=st.just(()),
    tap=st.none() | st.integers(0, 99_999_999).map("tap{}".format),
    switch=st.none() | NAMES.filter(bool),
    group=GROUPS,
    lladdr=st.none() | ADDRESSES,
    is_locked=st.booleans(),
    rdomain=RDOMAINS,
    is_up=st.booleans(),
)
IMAGE_DISKS = st.builds(
    DiskOption,
    st.sampled_from([DiskKind.PROBE, DiskKind.RAW, DiskKind.QCOW2]),
    PATHS,
    is_read_only=st.booleans(),
    serial=st.text("ab \"\\'", max_size=20),
    queues=st.integers(1, 64),
    is_process=st.just(False),
    is_private=st.just(False),
    is_snapshot=st.just(False),  # for `vmctl run` alone
    on_error=st.none() | st.sampled_from(OnError),
    window=st.none(),  # of snapshots alone
)
DISKS = (
    IMAGE_DISKS
    | st.tuples(PATHS, st.booleans()).map(
        lambda pair: DiskOption(DiskKind.PMEM, pair[0], is_private=pair[1])
    )
    | PATHS.map(lambda path: DiskOption(DiskKind.VHOST_USER, path))
)


@st.composite
def vms(draw: st.DrawFn) -> VmConfig:
    """Make a VM that a file can describe."""
    boot = draw(st.none() | PATHS)
    firmware = None if boot else draw(st.none() | st.sampled_from(["bios", "uefi", "/vm/OVMF.fd"]))
    vm = VmConfig(
        draw(NAMES),
        parent=draw(st.none() | NAMES),
        is_enabled=draw(st.booleans()),
        memory=draw(st.none() | st.integers(1, 128 << 10).map(lambda count: count << 20)),
        cpus=draw(st.none() | st.integers(1, 64)),
        boot=boot,
        firmware=firmware,
        initrd=tuple(draw(st.lists(PATHS, max_size=2))),
        append=draw(st.none() | TEXTS),
        boot_device=draw(st.sampled_from(BootDevice)),
        disks=tuple(draw(st.lists(DISKS, max_size=4))),
        cdrom=draw(st.none() | TEXTS.filter(bool)),
        interfaces=tuple(draw(st.lists(INTERFACES, max_size=4))),
        owner=draw(OWNERS),
        allow_instance=draw(st.frozensets(st.sampled_from(sorted(set(Right) - {Right.CPUS})))),
        instance_owner=draw(st.none() | OWNERS),
        is_sev=draw(st.booleans()),
    )
    given_ = {
        Right.BOOT: bool(boot or firmware or vm.initrd or vm.append is not None),
        Right.CDROM: vm.cdrom is not None or draw(st.booleans()),
        Right.CPUS: vm.cpus is not None,
        Right.DISK: bool(vm.disks),
        Right.INSTANCE: vm.parent is not None,
        Right.INTERFACE: bool(vm.interfaces) or draw(st.booleans()),
        Right.MEMORY: vm.memory is not None,
    }
    return vm._replace(
        given=frozenset(right for right, is_given in given_.items() if is_given),
        is_sev_es=vm.is_sev and draw(st.booleans()),
    )


def _is_unicast(number: int, bits: int, no_host: set[int]) -> bool:
    """Tell whether hosts can have addresses of a prefix, by its first byte."""
    return bits < 8 or (number != 0 and number >> (bits - 8) not in {0, *no_host})


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Make a configuration that a file can describe."""
    bits, bits6 = draw(st.integers(1, 16)), draw(st.integers(0, 64))
    first = st.integers(0, (1 << bits) - 1).filter(lambda one: _is_unicast(one, bits, NO_HOST4))
    first6 = st.integers(0, (1 << bits6) - 1).filter(lambda one: _is_unicast(one, bits6, {0xFF}))
    prefix = Prefix(draw(first) << (32 - bits), bits)
    prefix6 = Prefix(draw(first6) << (128 - bits6), bits6)
    is_inet6 = draw(st.booleans())
    local_prefix = draw(st.none() | st.just(prefix))
    return Config(
        vms=tuple(draw(st.lists(vms(), max_size=3))),
        switches=tuple(draw(st.lists(SWITCHES, max_size=3))),
        socket_owner=draw(st.none() | OWNERS),
        local_prefix=local_prefix,
        is_nat=local_prefix is not None and draw(st.booleans()),
        is_local_inet6=is_inet6,
        local_prefix6=draw(st.none() | st.just(prefix6)) if is_inet6 else None,
        staggered=draw(
            st.none() | st.builds(Staggered, st.integers(1, 1 << 40), st.integers(0, 1 << 40))
        ),
        agentx=draw(
            st.none()
            | st.builds(
                Agentx, st.text("ab\"' ", max_size=32), st.sampled_from(["/x", "/var/a b/\\"])
            )
        ),
    )


@settings(max_examples=40, deadline=None)
@given(configs())
def test_a_configuration_reads_again(config: Config) -> None:
    """Any configuration that a file can describe is read as it was written."""
    assert read_again(config) == config


@given(TEXTS)
def test_a_string_reads_again(text: str) -> None:
    """Quotes, blanks and backslashes are kept, in any place."""
    assert read_again(Config(vms=(VmConfig("x", append=text, given=BOOT),))).vms[0].append == text


def test_a_very_long_string_reads_again() -> None:
    """A string that is too long for one is written as several adjacent ones."""
    assert quoted("a" * 4_000_000).count('" "') == 1999
    text = "é\U0001f600\\" * 5000
    assert read_again(Config(vms=(VmConfig("x", append=text, given=BOOT),))).vms[0].append == text


BOOT = frozenset({Right.BOOT})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", '""'),
        ("a b", '"a b"'),
        ('a"b', r'"a\"b"'),
        ("a\\b", r'"a\b"'),
        ("a\\ b", r'"a\\ b"'),
        ('a\\"b', r'"a\\"b"'),
        ("a\\", '"a\\\\\n"'),
        ("a" * 2000 + "b", f'"{"a" * 2000}" "b"'),
    ],
)
def test_quotes(text: str, expected: str) -> None:
    """Only characters that would be read differently are escaped."""
    assert quoted(text) == expected
