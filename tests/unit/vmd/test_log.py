"""The daemon's log: it never blocks, a message is a line, and no source takes all room."""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from vmd.device.process import listen_to_vmm
from vmd.shared import log
from vmd.wire.channel import channel_pair
from vmd.wire.device import DEVICE_AND_VMM, VMM_AND_DEVICE
from vmd.wire.internal import SetVerbosity
from vmm_kvm.loop import EventLoop

Handler = log._Descriptor  # each process of the daemon has one


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe: the read end, which does not block, and the other."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    for fd in (reader, writer):
        with suppress(OSError):
            os.close(fd)


@pytest.fixture
def handler(pipe: tuple[int, int]) -> Iterator[log._Descriptor]:
    """A log that goes to the pipe."""
    made = Handler(pipe[1], log.Sink.STDERR)
    made.open(pipe[1], log.Sink.STDERR)
    yield made
    if made.fd != pipe[1]:
        os.close(made.fd)


def _record(message: str, *arguments: object, source: str = "") -> logging.LogRecord:
    record = logging.LogRecord("vmd", logging.WARNING, "", 0, message, arguments, None)
    if source:
        record.source = source
    return record


def _read(reader: int) -> list[str]:
    """Return the available lines."""
    data = b""
    with suppress(BlockingIOError):
        while part := os.read(reader, 1 << 20):
            data += part
    return data.decode().splitlines()


def test_a_message_is_one_line(handler: log._Descriptor, pipe: tuple[int, int]) -> None:
    """A message is one line, with any text of a client, a guest or a file in it."""
    handler.handle(_record("%s: no such file", "/tmp/\x1b[2J\nvmd: root said so\udcff"))
    assert _read(pipe[0]) == ["vmd: /tmp/\\x1b[2J\\x0avmd: root said so\\xff: no such file"]


def test_a_traceback_has_its_lines(handler: log._Descriptor, pipe: tuple[int, int]) -> None:
    """A traceback is logged with all its lines, and no control characters."""
    err = ValueError("a\x1b")
    record = logging.LogRecord("vmd", logging.ERROR, "", 0, "bug", (), (ValueError, err, None))
    handler.handle(record)
    lines = _read(pipe[0])
    assert lines[0] == "vmd: bug"
    assert lines[-1] == "vmd: ValueError: a\\x1b"


def test_a_log_that_nobody_reads_holds_up_nobody(
    handler: log._Descriptor, pipe: tuple[int, int]
) -> None:
    """Some lines are kept, in order; the others are counted, and reported when it is read again."""
    said = 0
    begun = time.monotonic()
    for number in range(3000):
        handler.handle(_record("line %d %s", number, "x" * 100, source=f"source {number}"))
        said += 1
    assert time.monotonic() - begun < 5
    with EventLoop() as loop:
        handler.follow(loop)
        lines: list[str] = []

        def read() -> None:
            lines.extend(_read(pipe[0]))
            if lines[-1].endswith("nobody read the log"):
                loop.stop()

        loop.add_reader(pipe[0], read)
        loop.run()
        loop.remove_reader(pipe[0])
        handler.follow(None)
    *kept, told = lines
    assert [line.split()[2] for line in kept] == [str(number) for number in range(len(kept))]
    assert told == f"vmd: {said - len(kept)} lines lost: nobody read the log"


def test_others_may_block_where_the_log_does_not(
    handler: log._Descriptor, pipe: tuple[int, int]
) -> None:
    """The descriptor of a terminal or a service manager stays blocking for others."""
    handler.handle(_record("one"))
    assert os.get_blocking(pipe[1])


def test_a_stream_to_the_journal_is_not_waited_for() -> None:
    """A socket takes what it has room for, without a flag that other processes would see."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        handler = Handler(ours.fileno(), log.Sink.JOURNAL)
        handler.open(ours.fileno(), log.Sink.JOURNAL)
        for number in range(5000):
            handler.handle(_record("%s", "x" * 200, source=f"source {number}"))
        assert select.select([theirs], [], [], 0)[0]
        assert theirs.recv(4) == b"<4>v"
        assert handler._socket
        handler._socket.detach()
        ours.close()


def test_one_source_leaves_room_for_others(
    handler: log._Descriptor, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source has some lines at once and so many a second; its next line counts the lost ones."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for number in range(1000):
        handler.handle(_record("asked %d", number, source="alice"))
    handler.handle(_record("asked", source="bob"))
    lines = _read(pipe[0])
    assert len(lines) == log.LINES_AT_ONCE + 1
    assert lines[-1] == "vmd: asked"
    now[0] += 1.0
    for number in range(1000):
        handler.handle(_record("asked %d", number, source="alice"))
    lines = _read(pipe[0])
    assert lines[0] == f"vmd: {1000 - log.LINES_AT_ONCE} lines left out: alice"
    assert len(lines) == log.LINES_PER_S + 1


def test_verbosity_is_for_our_own_messages() -> None:
    """Verbosity applies to our own messages, not to libraries' debug output."""
    before = {name: logging.getLogger(name).level for name in ("", "vmd", "vmm_kvm")}
    try:
        log.set_verbosity(2)
        assert logging.getLogger("vmd.vmm.process").isEnabledFor(logging.DEBUG)
        assert logging.getLogger("vmm_kvm.net").isEnabledFor(logging.DEBUG)
        assert not logging.getLogger("pyroute2").isEnabledFor(logging.DEBUG)
        log.set_verbosity(1)
        assert not logging.getLogger("vmd.vmm.process").isEnabledFor(logging.DEBUG)
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def test_a_device_process_is_told_how_much_to_log() -> None:
    """A serving device process gets the log level too; vmm's end does not end it."""
    vmm, device = channel_pair(VMM_AND_DEVICE, DEVICE_AND_VMM)
    before = {name: logging.getLogger(name).level for name in ("", "vmd", "vmm_kvm")}
    try:
        with EventLoop() as loop, vmm, device, listen_to_vmm(device, loop):
            vmm.send(SetVerbosity(level=2))
            vmm.close()
            loop.timer(loop.stop).arm(loop.monotonic_ns() + 50_000_000)
            loop.run()
        assert logging.getLogger("vmm_kvm.block").isEnabledFor(logging.DEBUG)
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
