"""The parser of vm.conf: the meaning of a file. The golden files have its error messages."""

from __future__ import annotations

import sys
from subprocess import run

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.config.fake_host import FakeHost
from vmd.config.disks import DiskKind, DiskOption
from vmd.config.host import FileText
from vmd.config.model import (
    Agentx,
    Config,
    InterfaceConfig,
    Owner,
    Prefix,
    Right,
    Staggered,
    SwitchConfig,
    VmConfig,
)
from vmd.config.parser import ConfigErrors, parse_config, read_config
from vmm_kvm.boot_device import BootDevice


class CountingHost(FakeHost):
    """A host that counts how often a file is read."""

    reads = 0

    def read_file(self, path: str) -> FileText:
        """Read a file, and count it."""
        self.reads += 1
        return super().read_file(path)


def parse(text: str, **files: str) -> Config:
    """Parse a right text; includes are found among the files, by name and `.conf`."""
    contents = {f"{name}.conf": inner.encode() for name, inner in files.items()}
    return parse_config("f", {}, host=FakeHost({"f": text.encode(), **contents}))


def vm_of(options: str) -> VmConfig:
    """Return a VM with these options, without its place."""
    (vm,) = parse(f'vm "x" {{\n{options}\n}}').vms
    return vm._replace(where="")


def test_an_empty_file() -> None:
    """Settings that a file leaves out stay unset: the reader has the defaults."""
    assert parse("") == Config()
    assert vm_of("enable") == VmConfig("x")


def test_globals() -> None:
    """Each global statement fills its field."""
    config = parse(
        "local prefix 10.64.0.0/10\nlocal inet6 prefix 'fd00::/16'\nsocket owner alice:staff\n"
        "agentx context c\nstaggered start parallel 2 delay 7\n"
    )
    assert config == Config(
        local_prefix=Prefix(0x0A40_0000, 10),
        is_local_inet6=True,
        local_prefix6=Prefix(0xFD00 << 112, 16),
        socket_owner=Owner(1000, 50),
        agentx=Agentx("c", "/var/agentx/master"),
        staggered=Staggered(2, 7),
    )


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ('"10/8"', Prefix(10 << 24, 8)),
        ('"10"', Prefix(10 << 24, 16)),
        ('"10.1"', Prefix(0x0A01 << 16, 16)),
        ("0.0.0.0/1", Prefix(0, 1)),
        ("10.0.0.0/08", Prefix(10 << 24, 8)),
    ],
)
def test_short_prefixes(text: str, prefix: Prefix) -> None:
    """Missing parts of an address are zero; a missing mask is sixteen bits."""
    assert parse(f"local prefix {text}").local_prefix == prefix


def test_switches() -> None:
    """A switch has its options' values; the last of a kind counts."""
    text = """
        switch "a" { disable
            group g
            interface br0
            locked lladdr
            rdomain 7
            down
        }
        switch b { interface "virbr0" }
        """
    assert parse(text).switches == (
        SwitchConfig("a", "br0", False, "g", True, 7, False),
        SwitchConfig("b", "virbr0"),
    )


def test_a_vm_with_everything() -> None:
    """Each option of a VM fills its field, and counts as a claim of an instance."""
    vm = vm_of(
        "disable\nmemory 1.5G\ncpus 3\nboot bsd.rd\ninitrd initrd.img\nappend 'a b'\n"
        "boot device net\ncdrom x.iso\nowner alice\nsev\n"
        "allow instance { boot, owner :staff, disk }\ndisk disk0.img format raw { ro queues 2 }"
    )
    assert vm == VmConfig(
        "x",
        is_enabled=False,
        memory=3 << 29,
        cpus=3,
        boot="/vm/bsd.rd",
        initrd=("/vm/initrd.img",),
        append="a b",
        boot_device=BootDevice.NET,
        disks=(DiskOption(DiskKind.RAW, "/vm/disk0.img", is_read_only=True, queues=2),),
        cdrom="x.iso",
        owner=Owner(1000),
        allow_instance=frozenset({Right.BOOT, Right.DISK}),
        instance_owner=Owner(None, 50),
        given=frozenset({Right.BOOT, Right.CDROM, Right.CPUS, Right.DISK, Right.MEMORY}),
        is_sev=True,
    )


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("memory 64M", {Right.MEMORY}),
        ("memory 67108864", {Right.MEMORY}),
        ("cpus 1", {Right.CPUS}),
        ("interface", {Right.INTERFACE}),
        ("interfaces 0", {Right.INTERFACE}),
        ("disk disk0.img", {Right.DISK}),
        ("cdrom a", {Right.CDROM}),
        ('cdrom ""', {Right.CDROM}),
        ("boot bsd.rd", {Right.BOOT}),
        ("firmware uefi", {Right.BOOT}),
        ("initrd initrd.img", {Right.BOOT}),
        ("append a", {Right.BOOT}),
        ("boot device disk", set()),
        ("owner alice", set()),
        ("allow instance boot", set()),
        ("disable", set()),
        ("seves", set()),
    ],
)
def test_what_a_block_speaks_of(option: str, given: set[Right]) -> None:
    """An option marks the VM as having something of its own, even none."""
    assert vm_of(option).given == given


def test_instances() -> None:
    """The first name is the template's; an instance is marked as one."""
    (vm,) = parse("vm a b instance c {\n\tdisable\n}").vms
    assert vm == VmConfig(
        "c", parent="ab", is_enabled=False, given=frozenset({Right.INSTANCE}), where="f:3"
    )


@pytest.mark.parametrize(
    ("options", "interfaces"),
    [
        ("interfaces 2", (InterfaceConfig(),) * 2),
        ("interface\ninterfaces 2", (InterfaceConfig(),) * 2),
        (
            "interfaces 1\ninterface tap1\ninterface",
            (InterfaceConfig(tap="tap1"), InterfaceConfig()),
        ),
        ("interface tap", (InterfaceConfig(),)),
        ("local interface switch s", (InterfaceConfig(is_local=True, switch="s"),)),
        (
            "interface tap0 { locked lladdr 0:1:2:3:4:f }",
            (InterfaceConfig(tap="tap0", is_locked=True, lladdr="00:01:02:03:04:0f"),),
        ),
        ("interface { lladdr 0:0:0:0:0:0 }", (InterfaceConfig(),)),
        (
            'interface { switch "" group "" rdomain 3 down }',
            (InterfaceConfig(rdomain=3, is_up=False),),
        ),
    ],
)
def test_interfaces(options: str, interfaces: tuple[InterfaceConfig, ...]) -> None:
    """A VM has its described interfaces, or the requested number, if that is larger."""
    assert vm_of(options).interfaces == interfaces


def test_settings_of_an_interface_do_not_reach_the_next() -> None:
    """Each interface starts with the defaults."""
    vm = vm_of("interface tap1 { down }\ninterface")
    assert vm.interfaces == (InterfaceConfig(tap="tap1", is_up=False), InterfaceConfig())


def test_bytes_of_a_character_in_two_strings() -> None:
    """Adjacent strings are one string of bytes, and text if it is valid."""
    host = FakeHost({"f": b'vm "\xc3" "\xa9" { disable }'})
    assert parse_config("f", {}, host=host).vms[0].name == "é"


def test_where_a_vm_stands() -> None:
    """A VM has the file and line of its block's end, in an included file too."""
    config = parse('vm a { disable }\ninclude "p.conf"\n', p="\nvm b {\n\tdisable\n}\n")
    assert [vm.where for vm in config.vms] == ["f:1", "p.conf:4"]


def test_macros_are_the_same_in_included_files() -> None:
    """Macros of a file are visible in files that include it and that it includes."""
    config = parse('a = x\ninclude "p.conf"\nvm $b { disable }', p="b = y\nvm $a { disable }")
    assert [vm.name for vm in config.vms] == ["x", "y"]


def test_errors_are_all_told() -> None:
    """The exception has every line about an error, without warnings, and nothing is used."""
    host = FakeHost({"f": b'a = b\nvm "x" { memory 1 }\n\n\nvm "y" { bogus }\n'})
    with pytest.raises(ConfigErrors) as caught:
        parse_config("f", {}, host=host)
    assert caught.value.lines == (
        "memory size must be at least 1MB",
        "f:2: failed to parse size: 1",
        'f:5: syntax error near "bogus"',
    )
    assert caught.value.warnings == ("warning: macro 'a' not used",)
    assert str(caught.value) == "\n".join(caught.value.lines)


def test_warnings_go_with_what_is_read() -> None:
    """Warnings are in the configuration, those about writable files first."""
    config = parse_config(
        "f", {}, host=FakeHost({"f": b'a = b\ninclude "open.conf"\n', "open.conf": b""})
    )
    warnings = ("open.conf: group writable", "warning: macro 'a' not used")
    assert config == Config(includes=("open.conf",), warnings=warnings)


def test_a_missing_file() -> None:
    """A missing default file counts as empty; another missing file is an error."""
    host = FakeHost({})
    assert parse_config("none", {}, host=host, is_optional=True) == Config()
    with pytest.raises(ConfigErrors, match=r"^failed to open none: No such"):
        parse_config("none", {}, host=host)


def test_broken_vms_can_be_left_out() -> None:
    """With `skips_broken`, a VM with a missing file is reported and left out, and no other."""
    text = (
        b'vm "a" { disk "none.img" }\nvm "b" { disk "disk0.img" }\n'
        b'vm "c" {\n\tboot "none"\n\tdisk "disk1.img"\n}\n'
    )
    host = FakeHost({"f": text})
    config = parse_config("f", {}, skips_broken=True, host=host)
    assert [vm.name for vm in config.vms] == ["b"]
    assert config.warnings == (
        "f:1: disk none.img: No such file or directory",
        'f:1: vm "a" is left out',
        "f:4: kernel path not found: No such file or directory",
        'f:6: vm "c" is left out',
    )
    with pytest.raises(ConfigErrors):
        parse_config("f", {}, host=host)
    with pytest.raises(ConfigErrors, match="syntax error"):
        parse_config("g", {}, skips_broken=True, host=FakeHost({"g": b"vm {"}))


def test_a_file_that_cannot_be_read() -> None:
    """Any other reason is an error, for the default file as well."""
    with pytest.raises(ConfigErrors, match=r"^failed to open unreadable\.conf: Permission"):
        parse_config("unreadable.conf", {}, host=FakeHost({}), is_optional=True)


def test_included_files_are_limited() -> None:
    """Files that include one another are limited, even if each includes two."""
    text = b'include "a.conf"\ninclude "a.conf"\n'
    host = CountingHost({"f": text, "a.conf": text})
    reading = read_config("f", {}, host=host)
    assert reading.errors[0] == "a.conf:1: failed to include file a.conf"
    assert reading.errors[-1] == "f:2: failed to include file a.conf"
    assert 16 < host.reads <= 257


def test_macros_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short file cannot expand without end by macros."""
    monkeypatch.setattr("vmd.config.lexer._EXPANSION_MAX", 100_000)
    data = b"m = " + b"a" * 8000 + b"\nvm x { append " + b"$m " * 13 + b"}\n"
    reading = read_config("f", {}, host=FakeHost({"f": data}))
    assert reading.errors == ("f:2: string too long", "f:2: syntax error")


def test_what_is_told_can_be_shown() -> None:
    """Control characters and bytes that are no text are shown as numbers."""
    reading = read_config("f\x1b", {}, host=FakeHost({"f\x1b": b'local prefix "\x1b\xff\xc2\x9b"'}))
    assert reading.errors == ("f\\x1b:1: invalid local prefix: invalid format",)
    reading = read_config("f", {}, host=FakeHost({"f": b'socket owner "\x1b[2J\xff\xc2\x9b"'}))
    assert reading.errors == ("f:1: failed to get user: \\x1b[2J\\xff\\x9b",)


def test_lengths_are_of_bytes() -> None:
    """A name may have 63 bytes, even if they are fewer letters."""
    assert parse(f'vm "{"é" * 31}x" {{ disable }}').vms[0].name == "é" * 31 + "x"
    with pytest.raises(ConfigErrors, match=r"^f:1: vm name too long$"):
        parse(f'vm "{"é" * 32}" {{ disable }}')


def test_our_words_are_no_keywords_elsewhere() -> None:
    """A file of OpenBSD's may use our words as names, without quotes."""
    config = parse("cpus = append\nvm cpus { cdrom $cpus }\nswitch queues { interface initrd }")
    assert (config.vms[0].name, config.vms[0].cdrom) == ("cpus", "append")
    assert (config.switches[0].name, config.switches[0].interface) == ("queues", "initrd")


WORDS = st.sampled_from(
    [
        *("vm", "switch", "x", '"y"', "{", "}", "\n", "=", ",", "interface", "memory", "64M", "7"),
        *("disk", "disk0.img", "format", "raw", "boot", "bsd.rd", "allow", "instance", "owner"),
        *("local", "lladdr", "prefix", "$m", "include", '"p.conf"', "disable", "up", "cpus", "'"),
    ]
)


@settings(deadline=None)
@given(st.binary(max_size=400) | st.lists(WORDS).map(lambda words: " ".join(words).encode()))
def test_any_file_is_read_or_refused(data: bytes) -> None:
    """Any file yields a configuration, or lines about its errors."""
    files = {"f": data, "p.conf": b"vm p { disable }", "g": data + b"\nbogus bogus bogus"}
    reading = read_config("f", {"m": "x { up"}, host=FakeHost(files))
    for line in (*reading.errors, *reading.warnings):
        assert line
        assert line.replace("\t", "").isprintable()
    assert read_config("g", {"m": "x"}, host=FakeHost(files)).errors


def test_reading_imports_little() -> None:
    """Reading a file imports nothing large, for `vmd -n` and every start of the daemon."""
    code = "import sys, vmd.config.check; print(' '.join(sys.modules))"
    done = run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    large = {"asyncio", "dataclasses", "inspect", "ipaddress", "logging", "msgspec", "socket"}
    assert large & set(done.stdout.split()) == set()


def test_many_files_by_one_pattern() -> None:
    """A pattern may include more files than the nesting limit; errors name their own file."""
    files = {
        f"d/{number:02}.conf": f'vm "v{number}" {{ disable }}\n'.encode() for number in range(40)
    }
    files["f"] = b'include "d/*.conf"\nvm "last" { disable }\n'
    config = parse_config("f", {}, host=FakeHost(files))
    assert [vm.name for vm in config.vms] == [*(f"v{number}" for number in range(40)), "last"]
    assert config.vms[7].where == "d/07.conf:1"
    assert config.vms[-1].where == "f:2"
    assert config.includes == ("d/*.conf",)
    files["d/20.conf"] = b"\nbogus\n"
    with pytest.raises(ConfigErrors) as caught:
        parse_config("f", {}, host=FakeHost(files))
    assert caught.value.lines == ("d/20.conf:2: syntax error at the end of the line",)
    files["d/20.conf"] = b'vm "open'
    with pytest.raises(ConfigErrors) as caught:
        parse_config("f", {}, host=FakeHost(files))
    assert caught.value.lines[0].startswith("d/20.conf:1: reached end of file")
