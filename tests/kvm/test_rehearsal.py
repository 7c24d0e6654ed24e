"""A VM process's life, as the zygote rehearses it in advance."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import partial

import pytest

from vmd.vm.process import be_vm
from vmd.vm.rehearsing import rehearse
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
    """Every rehearsal ends with the guest's last instruction, and without an error."""
    with Kvm() as kvm, caplog.at_level(logging.WARNING):
        for _ in range(3):
            rehearsal.play(partial(be_vm, kvm))
    assert caplog.messages == []


def test_a_clone_is_rehearsed(caplog: pytest.LogCaptureFixture) -> None:
    """A process that waits makes a machine and a copy of it, and leaves nothing of them open."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone
    with Kvm() as kvm, caplog.at_level(logging.WARNING):
        for _ in range(2):
            rehearse(kvm, is_clone=True)
    assert caplog.messages == []
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - names alone
