"""A VM process's life, as the zygote plays it before anybody needs one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import pytest

from vmd.vm.process import be_vm
from vmd.zygote.warm.rehearsal import Rehearsal
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import install_kick_signal

pytestmark = pytest.mark.kvm


@pytest.fixture
def rehearsal() -> Iterator[Rehearsal]:
    """Return the scene."""
    install_kick_signal()
    with Rehearsal() as made:
        yield made


def test_the_guest_ends_by_itself(rehearsal: Rehearsal, caplog: pytest.LogCaptureFixture) -> None:
    """Every play ends with the guest's last instruction, and nothing goes wrong meanwhile."""
    with Kvm() as kvm, caplog.at_level(logging.WARNING):
        for _ in range(3):
            rehearsal.play(partial(be_vm, kvm))
    assert caplog.messages == []


def test_a_vm_that_does_not_end_is_given_up(
    rehearsal: Rehearsal, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that waits for more to be said learns that nobody is there any more."""
    monkeypatch.setattr("vmd.zygote.warm.rehearsal.PATIENCE_S", 1)
    said: list[str] = []

    def be_silent(channel: object) -> None:
        from vmd.wire.channel import Channel, ChannelClosedError  # noqa: PLC0415 - for this alone

        assert isinstance(channel, Channel)
        with channel:
            try:
                while True:
                    received = channel.wait()
                    received.fds.close()
                    said.append(type(received.message).__name__)
            except ChannelClosedError:
                return

    rehearsal.play(be_silent)
    commands = ["PauseVm", "UnpauseVm", "AskStatistics", "LookAtTerminal", "AttachConsole"]
    assert said == ["Begin", *commands]
    assert caplog.messages == ["a guest that should end in a moment does not"]
