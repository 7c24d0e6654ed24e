"""Text in messages that is no UTF-8: names of files, and words of vm.conf."""

from __future__ import annotations

import os

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.config.disks import DiskKind, DiskOption
from vmd.wire.device import DEVICE_AND_VMM, VMM_AND_DEVICE, BeginDisk
from vmd.wire.files import OPENER_AND_PARENT, PARENT_AND_OPENER, FileUse, OpenFiles, WantedFile
from vmd.wire.internal import PARENT_AND_VMM, VMM_AND_PARENT, DiskSpec, VmLaunchFailed
from vmd.wire.messages import CLIENT_TO_DAEMON, DAEMON_TO_CLIENT, ErrorCode, Failed

ESCAPE = "\U0010ffff"
TEXT = st.text(st.one_of(st.characters(), st.sampled_from(["\udc80", "\udcff", ESCAPE, "\x7f"])))


@given(TEXT)
def test_names_arrive_as_they_are(text: str) -> None:
    """Any string arrives unchanged in another process of the daemon."""
    message = VmLaunchFailed(id=1, code=ErrorCode.EIO, message=text)
    assert PARENT_AND_VMM.decode(VMM_AND_PARENT.encode(message)) == message


@given(st.binary(max_size=40))
def test_bytes_of_a_name_arrive(name: bytes) -> None:
    """Paths of any bytes arrive unchanged, in records within records too."""
    option = DiskOption(DiskKind.RAW, os.fsdecode(name), is_read_only=True, queues=4)
    begin = BeginDisk(disk=DiskSpec(option=option, chain=(3, 1)), vm="web", verbosity=1)
    received = DEVICE_AND_VMM.decode(VMM_AND_DEVICE.encode(begin))
    assert received == begin
    assert isinstance(received, BeginDisk)
    assert type(received.disk.option) is DiskOption
    wanted = OpenFiles(files=(WantedFile(use=FileUse.DISK, path=os.fsdecode(name)),))
    assert OPENER_AND_PARENT.decode(PARENT_AND_OPENER.encode(wanted)) == wanted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("disk \udcff\udc80.img", "disk \\xff\\x80.img"),
        ("\ud800", "\\ud800"),
        (f"{ESCAPE}\u00e9", f"{ESCAPE}\u00e9"),
    ],
)
def test_clients_are_shown_text(text: str, shown: str) -> None:
    """JSON cannot hold such bytes: a client reads them as escapes, and all else unchanged."""
    data = DAEMON_TO_CLIENT.encode(Failed(code=ErrorCode.EIO, message=text, lines=(text,)))
    expected = Failed(code=ErrorCode.EIO, message=shown, lines=(shown,))
    assert CLIENT_TO_DAEMON.decode(data) == expected


@given(st.text(st.sampled_from([ESCAPE, "\0", "\x7f", "\u07ff", "\u0800", "a"])))
def test_what_a_broken_peer_says_is_text(said: str) -> None:
    """An incomplete escape is no error: no process of the daemon writes any."""
    raw = msgspec.msgpack.encode(
        {"type": "VmLaunchFailed", "id": 1, "code": "EIO", "message": said}
    )
    message = PARENT_AND_VMM.decode(raw)
    assert isinstance(message, VmLaunchFailed)
    assert len(message.message) <= len(said)
