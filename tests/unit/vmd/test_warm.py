"""Warming up: the process that continues afterwards, after any failure."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import pytest

from vmd.wire.channel import Channel
from vmd.wire.internal import EndReason, VmEnding, VmmToVm, VmReport, VmStarted
from vmd.zygote.warm.entry import (
    CONSTANT_VERSIONS,
    GATHERING_VERSIONS,
    IMMORTAL_VERSIONS,
    Warmth,
    WarmthError,
    warm_up,
)

BeVm = Callable[[Channel[VmReport, VmmToVm]], None]
LINE = "not warmed up, so each VM costs more memory: "


def _be_vm(channel: Channel[VmReport, VmmToVm]) -> None:
    """Be a VM that has run."""
    with channel:
        channel.send(VmStarted())


def _live(_fd: int, at_end: Callable[[], None]) -> NoReturn:
    at_end()
    os._exit(0)


def _warm(
    be_vm: BeVm,
    warmth: Warmth = Warmth.REHEARSE,
    *,
    log: pytest.LogCaptureFixture,
    patience_s: float = 30,
    leaves: bool = False,
) -> tuple[str, list[str]]:
    """Warm up in a process of its own; returns which process continued, and its log.

    With `leaves`, the process that is to be served does not wait for it.
    """
    read_fd, write_fd = os.pipe()
    vmm, served = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    first = os.fork()
    if first == 0:
        try:
            log.clear()
            confined: list[int] = []
            me = os.getpid()
            vmm.close()
            warm_up(
                warmth,
                lambda: confined.append(1),
                be_vm,
                _live,
                served=served.fileno(),
                patience_s=patience_s,
            )
            who = "first" if os.getpid() == me else "other"
            assert confined == [1]
            os.write(write_fd, "\n".join([who, *log.messages]).encode())
        except BaseException as err:  # noqa: BLE001 - nothing may go up from here
            os.write(write_fd, f"{type(err).__name__}: {err}".encode())
        finally:
            os._exit(0)
    os.close(write_fd)
    served.close()
    if leaves:
        vmm.close()
    with vmm, open(read_fd, "rb") as told:  # noqa: PTH123 - a descriptor
        who, *messages = told.read().decode().split("\n")
    with suppress(ChildProcessError):  # two children, of which we are the parent
        while True:
            os.wait()
    return who, messages


def test_the_warm_one_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """After success, a warm process takes the first one's place."""
    who, _ = _warm(_be_vm, log=caplog)
    assert who == "other"


def test_nothing_is_done_where_that_is_wanted(caplog: pytest.LogCaptureFixture) -> None:
    """With `off`, the first one continues, and nothing is rehearsed."""

    def be_vm(_channel: Channel[VmReport, VmmToVm]) -> None:
        raise RuntimeError("a rehearsal")

    assert _warm(be_vm, Warmth.OFF, log=caplog) == ("first", [])


def _fail(_channel: Channel[VmReport, VmmToVm]) -> None:
    raise RuntimeError("boom\nand more")


def _fail_as_a_vm(channel: Channel[VmReport, VmmToVm]) -> None:
    with channel:
        channel.send(VmEnding(reason=EndReason.FAILED, message="no memory"))


def _do_not_run(channel: Channel[VmReport, VmmToVm]) -> None:
    channel.close()


def _die(_channel: Channel[VmReport, VmmToVm]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("be_vm", "why"),
    [
        (_fail, "RuntimeError: boom"),
        (_fail_as_a_vm, "RehearsalError: no memory"),
        (_do_not_run, "RehearsalError: the guest has not run"),
        (_die, "its process has ended"),
        (lambda _channel: sys.exit(3), "SystemExit: 3"),
    ],
)
def test_a_failure_is_one_line(be_vm: BeVm, why: str, caplog: pytest.LogCaptureFixture) -> None:
    """After any failure the first one continues as if it had not tried, and logs the reason."""
    assert _warm(be_vm, log=caplog) == ("first", [LINE + why])


def test_a_rehearsal_that_hangs_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """A rehearsal that exceeds its time is killed, and the first process continues."""

    def hang(_channel: Channel[VmReport, VmmToVm]) -> None:
        while True:
            signal.pause()

    said = _warm(hang, log=caplog, patience_s=0.25)
    assert said == ("first", [f"{LINE}not done in 0.25 seconds"])


def test_nobody_warms_up_for_one_that_has_gone(caplog: pytest.LogCaptureFixture) -> None:
    """When vmm ends meanwhile, both processes end at once, without a word."""

    def hang(_channel: Channel[VmReport, VmmToVm]) -> None:
        while True:
            signal.pause()

    began = time.monotonic()
    assert _warm(hang, log=caplog, leaves=True) == ("", [])
    assert time.monotonic() - began < 15, "it has waited for the end of the rehearsal's time"


@pytest.mark.parametrize("warmth", [Warmth.REHEARSE, Warmth.ALL])
def test_gathering_that_fails_is_one_line(
    warmth: Warmth, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure of gathering has the same effect as one of a rehearsal."""

    def gather(_recorder: object, *, writes_tuples: bool) -> None:
        assert writes_tuples is (warmth is Warmth.ALL)
        raise MemoryError("none left")

    monkeypatch.setattr("vmd.zygote.warm.rehearsal.gather", gather)
    known = {sys.version_info[:2]}
    for table, versions in (
        ("GATHERING_VERSIONS", known),
        ("CONSTANT_VERSIONS", known),
        ("IMMORTAL_VERSIONS", set[tuple[int, int]]()),
    ):
        monkeypatch.setattr(f"vmd.zygote.warm.entry.{table}", versions)
    said = _warm(_be_vm, warmth, log=caplog)
    assert said == ("first", [f"{LINE}MemoryError: none left"])


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ("GATHERING_VERSIONS", "objects are gathered"),
        ("CONSTANT_VERSIONS", "tuples are written to"),
    ],
)
def test_an_unknown_interpreter_does_without(
    table: str, what: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an unknown version gathering is skipped, with one line."""
    known = {sys.version_info[:2]}
    unknown = set[tuple[int, int]]()
    monkeypatch.setattr("vmd.zygote.warm.entry.IMMORTAL_VERSIONS", unknown)
    for one in ("GATHERING_VERSIONS", "CONSTANT_VERSIONS"):
        versions = known if one != table else unknown
        monkeypatch.setattr(f"vmd.zygote.warm.entry.{one}", versions)
    monkeypatch.setattr("vmd.zygote.warm.rehearsal.gather", lambda *_, **__: None)
    version = ".".join(map(str, sys.version_info[:2]))
    line = f"no {what}: not tested on {sys.implementation.name} {version}"
    assert _warm(_be_vm, Warmth.ALL, log=caplog) == ("other", [line])


def test_python_3_12_does_without(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.12, which no Debian release has, only rehearses."""
    monkeypatch.setattr(sys, "version_info", (3, 12, 0, "final", 0))
    line = f"no objects are gathered: not tested on {sys.implementation.name} 3.12"
    assert _warm(_be_vm, Warmth.REHEARSE, log=caplog) == ("other", [line])


@pytest.mark.parametrize("warmth", [Warmth.REHEARSE, Warmth.ALL])
def test_known_interpreters_are_silent(warmth: Warmth, caplog: pytest.LogCaptureFixture) -> None:
    """On versions of the tables, everything is done without a log line."""
    versions = GATHERING_VERSIONS
    if warmth is Warmth.ALL:
        versions = CONSTANT_VERSIONS | IMMORTAL_VERSIONS
    if sys.version_info[:2] not in versions:
        pytest.skip("it is not done on this version")
    with caplog.at_level(logging.INFO):
        assert _warm(_be_vm, warmth, log=caplog) == ("other", [])


def test_the_environment_says_how_much() -> None:
    """The variable has one of three values; by default lives are rehearsed."""
    assert Warmth.of({}) is Warmth.of({"VMD_WARM": ""}) is Warmth.REHEARSE
    assert [Warmth.of({"VMD_WARM": text}) for text in ("off", "rehearse", "all")] == list(Warmth)
    for text in ("on", "All"):
        with pytest.raises(
            WarmthError, match=f"^VMD_WARM: '{text}' is none of off, rehearse, all$"
        ):
            Warmth.of({"VMD_WARM": text})
