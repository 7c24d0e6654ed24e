"""Disks on a command line: kinds, options, commas, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.config.disks import DiskError, DiskKind, DiskOption, OnError, parse_disk

OPTIONS = "(ro, serial=, queues=, process, snapshot, error= or private)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("disk.img", DiskOption(DiskKind.PROBE, "disk.img")),
        ("raw:disk.img", DiskOption(DiskKind.RAW, "disk.img")),
        ("qcow2:/a/b.qcow2", DiskOption(DiskKind.QCOW2, "/a/b.qcow2")),
        ("vhost-user:/run/s", DiskOption(DiskKind.VHOST_USER, "/run/s")),
        ("pmem:d,private", DiskOption(DiskKind.PMEM, "d", is_private=True)),
        ("./raw:d", DiskOption(DiskKind.PROBE, "./raw:d")),
        (":d", DiskOption(DiskKind.PROBE, ":d")),
        ("c:d", DiskOption(DiskKind.PROBE, "c:d")),
        ("RAW:d", DiskOption(DiskKind.PROBE, "RAW:d")),
        ("a,,b,ro", DiskOption(DiskKind.PROBE, "a,b", is_read_only=True)),
        ("d,error=stop", DiskOption(DiskKind.PROBE, "d", on_error=OnError.STOP)),
        ("d,snapshot", DiskOption(DiskKind.PROBE, "d", is_snapshot=True)),
        ("raw:d,error=report", DiskOption(DiskKind.RAW, "d", on_error=OnError.REPORT)),
        (
            "raw:d,queues=64,serial=abc=d,process",
            DiskOption(DiskKind.RAW, "d", serial="abc=d", queues=64, is_process=True),
        ),
    ],
)
def test_disks(text: str, expected: DiskOption) -> None:
    """The kind is the part before the first colon, if it is one; options follow commas."""
    assert parse_disk(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid disk: : no path"),
        ("raw:", "invalid disk: raw:: no path"),
        (",ro", "invalid disk: ,ro: no path"),
        (
            "d,rw",
            f"invalid disk: d,rw: unknown option 'rw' {OPTIONS}",
        ),
        ("d,", f"invalid disk: d,: unknown option '' {OPTIONS}"),
        (
            "d,ro=1",
            f"invalid disk: d,ro=1: unknown option 'ro=1' {OPTIONS}",
        ),
        (
            "d,serial",
            f"invalid disk: d,serial: unknown option 'serial' {OPTIONS}",
        ),
        ("d,error=", "invalid disk: d,error=: error is stop or report"),
        ("d,error=STOP", "invalid disk: d,error=STOP: error is stop or report"),
        ("pmem:d,snapshot", "invalid disk: pmem:d,snapshot: snapshot is not for pmem disks"),
        ("pmem:d,error=stop", "invalid disk: pmem:d,error=stop: error is not for pmem disks"),
        ("d,queues=0", "invalid disk: d,queues=0: queues are 1 to 64"),
        ("d,queues=x", "invalid disk: d,queues=x: queues are 1 to 64"),
        ("d,queues=²", "invalid disk: d,queues=²: queues are 1 to 64"),
        (
            "d,serial=123456789012345678901",
            "invalid disk: d,serial=123456789012345678901: serial of more than 20 bytes",
        ),
        ("raw:d,private", "invalid disk: raw:d,private: private is not for raw disks"),
        ("vhost-user:s,ro", "invalid disk: vhost-user:s,ro: ro is not for vhost-user disks"),
        ("pmem:d,ro", "invalid disk: pmem:d,ro: ro is not for pmem disks"),
    ],
)
def test_disks_that_are_refused(text: str, message: str) -> None:
    """One line names the disk and its fault."""
    with pytest.raises(DiskError) as caught:
        parse_disk(text)
    assert str(caught.value) == message


@given(st.text(min_size=1))
def test_any_path_can_be_written(path: str) -> None:
    """With `./` in front and commas doubled, every path is read back unchanged."""
    assert parse_disk("./" + path.replace(",", ",,")).path == "./" + path
