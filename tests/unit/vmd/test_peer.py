"""The parent's side of any other process: its start, its end, and requests to it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.unit.vmd.far import Far, run_until
from vmd.parent.peer import Peer
from vmd.wire.channel import Fds, MalformedError, OversizeError
from vmd.wire.internal import (
    PARENT_AND_VMM,
    VMM_AND_PARENT,
    EndHung,
    KillVm,
    LaunchVm,
    ParentToVmm,
    SetVerbosity,
    VmLaunched,
    VmmToParent,
    VmSpec,
)
from vmm_kvm.loop import EventLoop


class Rig:
    """A peer with the test in place of its processes."""

    def __init__(self, loop: EventLoop, patience_ns: int | None = None) -> None:
        self.loop = loop
        self.log: list[str] = []
        self.peer: Peer[ParentToVmm, VmmToParent] = Peer(
            "vmm",
            PARENT_AND_VMM,
            loop,
            self._take,
            on_start=lambda: self.log.append("start"),
            on_end=lambda: self.log.append("end"),
            on_give_up=lambda: self.log.append("give up"),
            patience_ns=patience_ns,
        )

    def _take(self, message: VmmToParent, _fds: Fds) -> None:
        assert not isinstance(message, EndHung)
        if message.id == 0:
            raise MalformedError("no such id")
        self.log.append(f"vm {message.id}")

    def start(self) -> Far[VmmToParent, ParentToVmm]:
        """Start a process."""
        far = Far(self.loop, VMM_AND_PARENT)
        self.peer.started(far.near, lambda: self.log.append("kill"))
        return far


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Return a peer without a process."""
    with EventLoop() as loop:
        made = Rig(loop)
        yield made
        made.peer.close()


def _large() -> LaunchVm:
    spec = VmSpec(id=1, name="x" * 100_000, memory=0, cpus=1, boot=0, boot_path="", tty=0, ring=0)
    return LaunchVm(spec=spec)


def test_each_process_is_told_how_much_to_log(rig: Rig) -> None:
    """Each process gets the log level, also a later one, before any other message."""
    rig.peer.set_verbosity(2)
    with rig.start() as far:
        assert far.wait(SetVerbosity) == SetVerbosity(level=2)
        assert rig.log == ["start"]
        rig.peer.set_verbosity(0)
        assert far.wait(SetVerbosity, 2) == SetVerbosity(level=0)


def test_without_a_process_nothing_is_sent(rig: Rig) -> None:
    """Without a process descriptors of a message are closed, also after a process has ended."""
    read_fd, write_fd = os.pipe()
    assert not rig.peer.send(KillVm(id=1), (write_fd,))
    assert os.read(read_fd, 1) == b""
    os.close(read_fd)
    with rig.start():
        is_there = [rig.peer.is_there]
        rig.peer.ended()
        is_there.append(rig.peer.is_there)
        assert is_there == [True, False]
        assert not rig.peer.send(KillVm(id=1))
    rig.peer.give_up()
    assert rig.log == ["start", "end", "give up"]


def test_one_that_is_gone_cannot_be_sent_to(rig: Rig) -> None:
    """A message to a process that has ended is lost; nothing is raised."""
    with rig.start() as far:
        far.channel.close()
        assert not rig.peer.send(KillVm(id=1))
    assert rig.log == ["start"]


def test_what_is_too_large(rig: Rig) -> None:
    """A message that is too large is lost, or raised for a caller with a smaller one."""
    spec = VmSpec(id=1, name="x" * (1 << 20), memory=0, cpus=1, boot=0, boot_path="", tty=0, ring=0)
    with rig.start() as far:
        assert not rig.peer.send(LaunchVm(spec=spec))
        with pytest.raises(OversizeError):
            rig.peer.send_or_raise(LaunchVm(spec=spec))
        assert rig.peer.send(KillVm(id=1))
        assert far.wait(KillVm).id == 1


def test_one_that_says_what_is_no_message_is_killed(rig: Rig) -> None:
    """Nonsense ends a process, whether the channel finds it or the receiver of the message."""
    with rig.start() as far:
        far.say(VmLaunched(id=7, pid=1))
        far.say(VmLaunched(id=0, pid=1))
        far.say(VmLaunched(id=8, pid=1))
        run_until(rig.loop, lambda: rig.log[-1] == "kill")
    assert rig.log == ["start", "vm 7", "kill"]
    rig.peer.ended()
    with rig.start() as far:
        far.channel.close()
        run_until(rig.loop, lambda: True)
    assert rig.log[3:] == ["end", "start"]


def test_one_that_does_not_read_holds_its_sources(rig: Rig) -> None:
    """Sources are read again when it has read, or when it is gone; the next process is fresh."""
    with EventLoop() as loop:
        source = Rig(loop)
        rig.peer.add_source(source.peer)
        with source.start() as clients, rig.start() as far:
            far.channel.hold("the test")
            for _ in range(20):
                rig.peer.send(_large())
            clients.say(VmLaunched(id=7, pid=1))
            clients.say(VmLaunched(id=8, pid=1))
            loop.call_soon(loop.stop)
            loop.run()
            assert source.log == ["start"]
            far.channel.release("the test")
            far.wait(LaunchVm, 20)
            run_until(loop, lambda: source.log == ["start", "vm 7", "vm 8"])
            far.channel.hold("the test")
            for _ in range(20):
                rig.peer.send(_large())
            source.peer.ended()
            with source.start() as others:
                others.say(VmLaunched(id=9, pid=1))
                loop.call_soon(loop.stop)
                loop.run()
                assert source.log[-1] == "start"
                rig.peer.ended()
                run_until(loop, lambda: source.log[-1] == "vm 9")
        source.peer.close()


def test_patience_with_one_that_does_not_read_ends() -> None:
    """A process that leaves its channel full for too long is killed."""
    with EventLoop() as loop:
        rig = Rig(loop, patience_ns=1_000_000)
        with rig.start() as far:
            far.channel.hold("the test")
            for _ in range(20):
                rig.peer.send(_large())
            run_until(loop, lambda: rig.log[-1] == "kill")
        rig.peer.close()
