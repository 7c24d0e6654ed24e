"""A snapshot's manifest: exactly the expected fields, or a line about the fault."""

from __future__ import annotations

import json

import pytest

from tests.unit.snapshot.samples import MANIFEST
from vmm_kvm.errors import SnapshotError
from vmm_kvm.snapshot.json_text import parse
from vmm_kvm.snapshot.manifest import MANIFEST_MAX, Boot, Manifest, Owner, decode, encode
from vmm_kvm.state import Json

TEXT = encode(MANIFEST)
FIELDS = json.loads(TEXT)
HUGE = 1 << 70


def changed(**fields: object) -> bytes:
    """Return the sample's text with other fields."""
    return json.dumps({**FIELDS, **fields}).encode()


def test_it_reads_what_it_writes() -> None:
    """A manifest is read back unchanged, with its optional parts and without."""
    plain = MANIFEST._replace(
        firmware=None,
        cdrom=None,
        disks=(),
        interfaces=(),
        uuid=bytes(range(16)),
        owner=Owner(None, 7),
    )
    assert (decode(TEXT), decode(encode(plain))) == (MANIFEST, plain)


def test_the_text_stays_as_it_is() -> None:
    """The text of a manifest stays that of the first version: snapshots outlive programs."""
    assert TEXT.decode() == (
        '{"format":[1,0],"name":"web","created_ns":1700000000000000000,'
        '"host":{"kernel":"6.1.0","tsc_khz":2400000},'
        '"cpuid":[[0,0,13,1970169159,1818588270,1231384169],'
        "[1,0,526058,67584,4294586883,395049983],[7,0,0,43804591,64,0],[13,0,7,832,832,0],"
        '[2147483649,0,0,0,289,739248128]],"owner":{"uid":1000,"gid":null},'
        '"memory_size":3145728,"cpus":1,"regions":[[0,2097152],[4294967296,1048576]],'
        '"state_size":146,"uuid":null,"serial":"","boot":{"image":null,"firmware":"bios",'
        '"initrd":[],"append":null,"device":"disk"},'
        '"firmware":{"name":"bios.bin","size":131072},'
        '"disks":[{"path":"/vm/disk.qcow2","kind":"qcow2","serial":"serial",'
        '"queues":2,"is_read_only":false,"is_private":false,"is_process":false}],'
        '"cdrom":"/vm/install.iso","interfaces":[{"lladdr":"fe:e1:bb:d1:00:01","mtu":1500,'
        '"queues":1,"is_local":false,"switch":"uplink","group":null,"rdomain":null,'
        '"is_locked":false,"is_up":true,"text":""}],"has_console":false}'
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "manifest: not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"[" * 60_000, "manifest: not JSON: too deep"),
        (b"\xff", "manifest: not JSON: 'utf-8' codec can't decode byte 0xff in position 0: "),
        (b"[]", "manifest: no object"),
        (b" " * (MANIFEST_MAX + 1), "manifest: 65537 bytes, at most 65536 are possible"),
        (b'{"format":[1,0],"format":[1,0]}', "manifest: not JSON: a field is there twice"),
        (b'{"format":[1,0.5]}', "manifest: not JSON: a number that is no integer"),
        (b'{"format":[1,NaN]}', "manifest: not JSON: a number that is no integer"),
        (b'{"format":[1,' + b"9" * 50_000 + b"]}", "not JSON: a number of more than 64 bits"),
        (changed(format=[2, 3]), "incompatible dump version: 2.3, this program reads 1.x"),
        (changed(format=[1]), "manifest: format: 1 long, not 2"),
        (changed(more=1), "manifest: 'more' is not known"),
        (changed(name=None), "manifest: name: not of type str"),
        (changed(name="a\nb"), "manifest: name: not a line of 0 to 63 characters"),
        (changed(cpus=0), "manifest: cpus: 0 is not 1 to 64"),
        (changed(cpus=True), "manifest: cpus: not of type int"),
        (changed(memory_size=1 << 40), "manifest: memory_size: 1099511627776 is not 1048576 to"),
        (changed(regions=[[0, 4096]]), "manifest: regions: 4096 bytes of 3145728"),
        (
            changed(regions=[[4096, 4096], [0, 4096]]),
            "manifest: regions: not ascending, or not page",
        ),
        (changed(regions=[[0, 1]]), "manifest: regions: not ascending, or not page aligned"),
        (changed(regions=[[0, 0]]), "manifest: regions: 0: 1: 0 is not 1 to"),
        (changed(regions=[[0, 0]] * 9), "manifest: regions: 9 long, not 0 to 8"),
        (changed(state_size=1 << 40), "manifest: state_size: 1099511627776 is not 0 to 134217728"),
        (changed(uuid="00"), "manifest: uuid: 1 long, not 16 to 16"),
        (changed(uuid="g" * 32), "manifest: uuid: no hexadecimal digits"),
        (changed(boot=None), "manifest: boot: no object"),
        (changed(disks=[{}]), "manifest: disks: 0: 'is_private' is missing"),
        (changed(has_console=0), "manifest: has_console: not of type bool"),
        (changed(cpuid=[[0]]), "manifest: cpuid: 0: no object"),
        (changed(cpuid=[[0, 0, 0, 0, 0, -1]]), "manifest: cpuid: 0: d: -1 is not 0 to"),
        (changed(owner={"uid": 0}), "manifest: owner: 'gid' is missing"),
        (changed(owner={"uid": HUGE, "gid": None}), "a number of more than 64 bits"),
    ],
)
def test_what_is_not_expected_is_refused(text: bytes, message: str) -> None:
    """Each fault of a manifest is one line with its place."""
    with pytest.raises(SnapshotError) as caught:
        decode(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_later_minor_version_may_have_more() -> None:
    """Fields of a later minor version are ignored, and no others."""
    known: dict[str, Json] = {"is_live": False, "vsock_cid": None, "kept": []}
    known |= {"has_balloon": False, "has_watchdog": False}
    later = changed(format=[1, 6], **known, added=[1])
    assert decode(later) == MANIFEST._replace(minor=6)


def test_a_live_stream_is_of_a_minor_version_of_its_own() -> None:
    """A live stream has a minor version of its own, which readers of the first version refuse."""
    live = MANIFEST._replace(is_live=True, minor=1)
    assert decode(encode(MANIFEST._replace(is_live=True))) == live
    with pytest.raises(SnapshotError, match="'is_live' is missing"):
        decode(changed(format=[1, 1]))


@pytest.mark.parametrize("cid", [3, 4294967294])
@pytest.mark.parametrize("is_live", [False, True])
def test_a_vsock_device(cid: int, is_live: bool) -> None:
    """The guest's vsock address raises the manifest's minor version."""
    wanted = MANIFEST._replace(vsock_cid=cid, is_live=is_live, minor=2)
    assert decode(encode(wanted._replace(minor=0))) == wanted
    with pytest.raises(SnapshotError, match="'vsock_cid' is missing"):
        decode(changed(format=[1, 2], is_live=False))
    with pytest.raises(SnapshotError, match=r"vsock_cid: not in format 1\.0"):
        decode(changed(vsock_cid=3))
    with pytest.raises(SnapshotError, match="vsock_cid: 2 is not 3 to 4294967294"):
        decode(changed(format=[1, 2], is_live=False, vsock_cid=2))


@pytest.mark.parametrize(
    ("field", "wanted"),
    [
        ("has_balloon", MANIFEST._replace(has_balloon=True, minor=4)),
        ("has_watchdog", MANIFEST._replace(has_watchdog=True, minor=5)),
    ],
)
def test_devices_of_later_versions(field: str, wanted: Manifest) -> None:
    """Each is part of a manifest of a minor version of its own."""
    assert decode(encode(wanted._replace(minor=0))) == wanted
    with pytest.raises(SnapshotError, match=rf"{field}: not in format 1\.0"):
        decode(changed(**{field: True}))


def test_what_cannot_be_described_is_not_written() -> None:
    """A machine with a path that no manifest can hold is refused at writing."""
    with pytest.raises(SnapshotError, match="boot: image: not a line of 0 to 4096 characters"):
        encode(MANIFEST._replace(boot=Boot(image="line\nbreak")))


def test_numbers_of_any_length_take_no_time() -> None:
    """The length of a number is checked before the number is converted."""
    with pytest.raises(SnapshotError, match="more than 64 bits"):
        parse(b"-" + b"1" * 1_000_000, "it")


@pytest.mark.parametrize(
    "kept",
    [[[4096, 512]], [[4096, 512], None], [[-1, 512]], [[1 << 61, 512]], [[4096]], [4096], None],
)
def test_where_disks_are(kept: Json) -> None:
    """Each disk in the file has a place and a size; there are as many as disks."""
    text = changed(format=[1, 3], is_live=False, vsock_cid=None, kept=kept)
    if kept == [[4096, 512]]:
        manifest = decode(text)
        assert manifest.kept == ((4096, 512),)
        assert decode(encode(manifest)) == manifest
        return
    with pytest.raises(SnapshotError, match="manifest: kept"):
        decode(text)
